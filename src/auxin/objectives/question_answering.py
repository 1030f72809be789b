"""Extractive question answering: tell at which tokens of a text the answer to a question begins and ends."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig

from auxin.data.dataset import SampleForm
from auxin.data.question_source import ANSWER, CONTEXT, LONGEST
from auxin.errors import ConfigError
from auxin.objectives.objective import NOT_A_NUMBER, Answers, learnt_from
from auxin.objectives.task import TaskObjective, TaskSettings


class QuestionAnsweringObjective(TaskObjective):
    """Samples with the numbers of an answer's first and last token, (samples,) each. The loss of a sample is the mean
    of the cross-entropies of the two ends over all tokens, padding among them, as transformers has it."""

    answers: ClassVar[Answers] = "spans"

    def sample_targets(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One of each sample."""
        return torch.ones_like(inputs[ANSWER[0]])

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Those of the samples, the mean of both ends each, (samples,)."""
        return super().losses(model, inputs).unflatten(0, (-1, len(ANSWER))).mean(1)

    def logits(self, output: Any) -> Tensor:
        """Of the beginnings and the ends, (samples, 2, tokens)."""
        return torch.stack([output.start_logits, output.end_logits], 1)

    def spans(self, model: nn.Module, inputs: Mapping[str, Tensor], context: Tensor) -> Tensor:
        """Those with the largest sum of both logits of all that begin and end in the context, of `LONGEST` tokens at
        most; of equal ones the first. NOT_A_NUMBER where a logit is none, or no sum is finite."""
        logits, _ = self._logits_and_labels(model, inputs)
        both = logits.float().unflatten(0, (-1, len(ANSWER)))
        outside = ~context.to(both.device).bool()
        begins, ends = both.masked_fill(outside[:, None], -torch.inf).unbind(1)
        # By where a span begins and how far from there it ends: what is too long is not even looked at.
        near = nn.functional.pad(ends, (0, LONGEST - 1), value=-torch.inf).unfold(1, LONGEST, 1)
        sums = (begins[:, :, None] + near).flatten(1)
        largest, best = sums.max(1)
        begin, further = best // LONGEST, best % LONGEST
        none = both.isnan().flatten(1).any(1) | ~largest.isfinite()
        return torch.stack([begin, begin + further], 1).masked_fill(none[:, None], NOT_A_NUMBER)

    def _labels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([inputs[name] for name in ANSWER], 1)

    def describe(self) -> dict[str, str]:
        """What is told apart."""
        return {"answers": f"where they begin and end, of {self.form.length:,} tokens"}


class QuestionAnswering(TaskSettings):
    """Tell where in a text the answer to a question begins and where it ends, with an encoder or a decoder. Losses are
    nats per example, the mean of both ends."""

    kind: Literal["question_answering"] = "question_answering"
    """Says that this is question answering."""
    bound: ClassVar[type[TaskObjective]] = QuestionAnsweringObjective
    of_samples: ClassVar[tuple[str, ...]] = ANSWER
    for_measures: ClassVar[tuple[str, ...]] = (CONTEXT,)

    def auto_class(self, form: SampleForm) -> Any:
        """Models that find answers in texts."""
        return AutoModelForQuestionAnswering

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse encoder-decoders, and heads of other sizes; ConfigError."""
        super().check_config(config)
        if config.num_labels != len(ANSWER):
            raise ConfigError(
                f"num_labels: the model's config says {config.num_labels}, and there are two things to tell of an "
                "answer, where it begins and where it ends. Set it to 2, or give another model."
            )

    def check_form(self, form: SampleForm) -> None:
        """Refuse samples without answers; ConfigError."""
        if not set(ANSWER) <= set(form.tensors):
            raise ConfigError(
                f"objective: 'question_answering' needs an answer in each sample, and a sample of this data holds "
                f"{', '.join(form.tensors)} alone. Set data.kind: question_answering, or "
                f"training.objective: {learnt_from(form)}."
            )

    def config_values(self, form: SampleForm) -> dict[str, Any]:
        """Two things to tell of each token."""
        return {"num_labels": len(ANSWER)}


OBJECTIVE = QuestionAnswering
