"""Models, data and comparisons small enough to train in a blink."""

import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import Seq2SeqLMOutput

from auxin.data import Contexts, SampleForm
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.objectives import ObjectiveSettings
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss
from auxin.training import TrainingSettings, latest_checkpoint
from auxin.training.optimizer import build_optimizer
from tiny_models import fresh_llama

Model = TypeVar("Model", bound=PreTrainedModel)

VOCABULARY = 64
CONTEXT = 16
POISON = VOCABULARY - 1
"""A token that only bad batches contain."""


class TinyData:
    """Contexts that count upwards from a random start: easy to learn, so losses are smooth."""

    def __init__(self, contexts: int = 64, fingerprint: str = "f1", poisoned_rows: tuple[int, ...] = ()) -> None:
        generator = np.random.default_rng(0)
        starts = generator.integers(0, POISON, (contexts + 8, 1))
        rows = ((starts + np.arange(CONTEXT)) % POISON).astype(np.uint16)
        self.train, self.validation = rows[:contexts].copy(), rows[contexts:]
        for row in poisoned_rows:
            self.train[row, CONTEXT // 2] = POISON
        self.form = SampleForm("token", CONTEXT, ("input_ids",), length=CONTEXT, vocab_size=VOCABULARY)
        self.fingerprint = fingerprint
        self.bytes_per_unit = None

    def split(self, name: str) -> Contexts:
        return Contexts(getattr(self, name))

    def processor(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {}


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    return fresh_llama(seed, **{"vocab_size": VOCABULARY, **sizes, **changes})


def wide_llama() -> LlamaForCausalLM:
    """Its weights take far more than what a pass of few tokens leaves."""
    return tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=6)


def tiny_gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def tiny_tokenformer(seed: int = 0, **changes: object) -> TokenFormerForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"qkv_tokens": [24, 8], "proj_tokens": [24, 8], "ffn_tokens": [48, 16]}
    return TokenFormerForCausalLM(TokenFormerConfig(**{"vocab_size": VOCABULARY, **sizes, **tokens, **changes}))


NORMED = {
    "score_function": "l2_norm_gelu",
    "proj_score_function": "gelu_l2_norm",
    "qkv_tokens": [7, 6],
    "proj_tokens": [5],
    "ffn_tokens": [13, 5, 9],
    "qkv_tau": [2.0, 3.5],
    "ffn_eps": [1e-6, 1e-3, 1e-6],
    "value_initializer_range": 0.1,
}
"""A TokenFormer's changes so that its groups have norms, scales and epsilons of their own, and few numbers divide how
many tokens it has."""


SPANS = {"objective": {"kind": "span_corruption", "noise_density": 0.3, "mean_span_length": 2.0}}
"""Of a context of 16 tokens 5 are cut out in 2 spans."""


def tiny_t5_config(dropout: float = 0.0, **changes: object) -> T5Config:
    values = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": dropout}
    tokens = {"vocab_size": VOCABULARY + 2, "pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return T5Config(**{**values, **tokens, **changes})


def tiny_t5(seed: int = 0, dropout: float = 0.0, **changes: object) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(tiny_t5_config(dropout, **changes))


class PoisonedT5(T5ForConditionalGeneration):
    """Its loss is nan on any batch with the poison token. (A nan in its embeddings would be one in all its logits.)"""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object) -> Seq2SeqLMOutput:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if self.training and labels is not None and bool((torch.cat([input_ids, labels], 1) == POISON).any()):
            output.loss = output.loss * torch.nan
        return output


def poisoned_t5(seed: int = 0, dropout: float = 0.1) -> PoisonedT5:
    torch.manual_seed(seed)
    return PoisonedT5(tiny_t5_config(dropout))


def poisoned(model: Model) -> Model:
    """`model`, whose loss is nan from now on on any batch with the poison token; its weights are finite."""

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == POISON)[..., None], torch.nan)

    model.get_input_embeddings().register_forward_hook(spoil)
    return model


def poisoned_bert(seed: int = 0, dropout: float = 0.1, classes: int = 3) -> BertForSequenceClassification:
    """A classifier whose loss is nan on any batch with the poison token, and untouched by it otherwise."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0}
    return poisoned(BertForSequenceClassification(BertConfig(**sizes, **rates, **tokens, num_labels=classes)))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "tokenformer": tiny_tokenformer}


def poisoned_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A model whose loss is nan on any batch with the poison token, and untouched by it otherwise."""
    return poisoned(tiny_llama(seed, **changes))


def tiny_settings(**changes: object) -> TrainingSettings:
    values = {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "tensorboard": False, "log_interval": 5}
    return TrainingSettings(**{**values, **changes})


def stepped(seed: int = 0) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A tiny Llama and its optimizer after one step, so that there are moments."""
    model = tiny_llama(seed)
    optimizer = build_optimizer(model, tiny_settings(steps=1))
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model, optimizer


def held_out_loss(
    model: PreTrainedModel,
    array: np.ndarray,
    batch_size: int = 4,
    max_batches: int | None = None,
    objective: ObjectiveSettings | None = None,
) -> float:
    """The mean loss in nats of a target that `objective` (None: each next token) makes of the contexts in `array`."""
    length = array.shape[1]
    form = SampleForm("token", length, ("input_ids",), length=length, vocab_size=VOCABULARY)
    bound = (objective or Causal()).bind(model.config, form)
    return Loss()(model, Contexts(array), bound, batch_size, max_batches)


class Look:
    """A hook that keeps the gradients of every step."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []

    def attach(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        self.model = model

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None:
        self.gradients.append([p.grad.clone() for p in self.model.parameters()])

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None: ...


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.state_dict().values()])


def bits(tensor: torch.Tensor) -> bytes:
    """Compares nan with nan, and 0 with -0, as different bits are different."""
    return tensor.contiguous().numpy().tobytes()


def checkpoint_bits(checkpoint: Path) -> dict[str, bytes]:
    """Weights, moments and random state of a checkpoint, from its files."""
    files = [*checkpoint.glob("*.safetensors"), *(checkpoint / "training").glob("*.safetensors")]
    assert len(files) == 2
    return {f"{file.parent.name == 'training'}:{key}": bits(t) for file in files for key, t in load_file(file).items()}


def read_metrics(output_dir: Path, timed: bool = False) -> list[dict]:
    """The lines of metrics.jsonl; without what depends on the clock unless `timed`."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    clock = () if timed else ("seconds", "units_per_second", "flops_per_second", "data_share")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


STEPS = 50
FIFTY = {"steps": STEPS, "batch_size": 8, "warmup_steps": 5, "checkpoint_interval": 20, "evaluation_interval": 20}
"""A training that several processes and one are compared by."""


def apart(one: Path, other: Path) -> tuple[float, float]:
    """How far losses, and how far weights and moments, of two runs lie apart at most."""
    lines = [read_metrics(folder) for folder in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    names = ("loss", "gradient_norm", "validation_loss")
    pairs = [(a[name], b[name]) for a, b in zip(*lines, strict=True) for name in names if name in a]
    assert len(pairs) >= 2 * STEPS
    losses = max(abs(a - b) for a, b in pairs)
    files = ("model.safetensors", "training/state.safetensors")
    tensors = [[load_file(latest_checkpoint(folder) / name) for name in files] for folder in (one, other)]
    worst = 0.0
    for a, b in zip(*tensors, strict=True):
        assert a.keys() == b.keys()
        worst = max(worst, *(float((a[name] - b[name]).abs().max()) for name in a if a[name].is_floating_point()))
    return losses, worst
