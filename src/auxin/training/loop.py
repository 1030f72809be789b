"""The training loop of one stage: steps, evaluations, checkpoints, resumption."""

import contextlib
import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from auxin.accounting.ledger import Ledger, StageRecord
from auxin.accounting.parameters import count_parameters
from auxin.data import PackedData, make_loader
from auxin.errors import CheckpointError, TrainingError
from auxin.evaluation.perplexity import evaluate_loss
from auxin.objectives.objective import model_inputs, objective_flops
from auxin.planning.hooks import Hook
from auxin.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_name,
    latest_checkpoint,
    load_weights,
    name_latest,
    prune_checkpoints,
    read_state,
    read_tensors,
    rewrite_state,
    write_checkpoint_folder,
)
from auxin.training.fit import check_fit
from auxin.training.guard import Guard, GuardEvent
from auxin.training.hardware import choose_device, choose_precision, peak_flops
from auxin.training.identity import RunIdentity
from auxin.training.interruption import Interruption, TrainingInterrupted
from auxin.training.metrics import MetricsLog, last_progress
from auxin.training.optimizer import build_optimizer, restore_optimizer
from auxin.training.progress import ProgressDisplay
from auxin.training.schedule import learning_rate
from auxin.training.settings import TrainingSettings
from auxin.training.state import TrainingState


@dataclass(frozen=True)
class TrainingResult:
    """What a stage of training gave."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    final_validation_loss: float | None
    """Over the whole validation split, in nats per predicted token; None when `stop_after` ended the call before the
    stage."""
    tokens: int
    """Training tokens of the stage, those of skipped and rewound steps included: they cost as much. They are tokens of
    text, whatever the objective makes of them."""
    flops: float
    """Training FLOPs of the stage, forward and backward."""
    seconds: float
    """Wall time of the stage, evaluations included, summed over its pieces."""
    steps: int
    """Optimizer steps done."""
    data_position: int
    """Batch of the data order that a next stage with the same batch size would start at to see new data."""
    ledger: Ledger
    """The parent's books with this stage at their end."""


def train(
    model: PreTrainedModel,
    data: PackedData,
    settings: TrainingSettings,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    optimizer_from: str | Path | None = None,
    ledger: Ledger | None = None,
    hooks: Sequence[Hook] = (),
    stage_name: str = "train",
    stop_after: int | None = None,
    data_position: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train a language model for one stage, in place; resume where `output_dir` holds a started run.

    The same call with the same seed on the same machine with the same number of threads gives the same bits, whether it
    was killed and resumed or left alone. On CUDA this holds as far as the kernels are deterministic: see
    `torch.use_deterministic_algorithms`, which is left to the caller. The caller's random state is left alone.

    Args:
        model: any Hugging Face causal language model, or encoder-decoder for span corruption, with float32 weights; it
            is moved to the device of the settings.
        data: packed contexts; `train` is learnt, `validation` evaluated.
        settings: the stage's settings.
        output_dir: gets `checkpoints/`, `latest`, `metrics.jsonl` and `tensorboard/`.
        tokenizer: saved with each checkpoint; None takes the data's.
        optimizer_from: a checkpoint whose AdamW moments are taken over; the schedule starts anew. None: fresh moments.
        ledger: the parent's books; None starts new ones.
        hooks: see `Hook`; resumed with the run.
        stage_name: of the ledger's record.
        stop_after: save and return after this many steps of the stage; calling again goes on.
        data_position: batch of the data order to start at, so that a stage need not see again what its parent saw.
        progress: show the progress on standard error.

    Raises:
        ConfigError: settings, model and data do not fit together.
        CheckpointError: the run in `output_dir` is another one or damaged, or a checkpoint can't be written.
        TrainingError: too many bad steps; the checkpoint named in `latest` is good.
        TrainingInterrupted: SIGINT or SIGTERM; the state was saved.
    """
    output_dir = Path(output_dir)
    device = choose_device(settings.device)
    check_fit(model, data, settings)
    flops = objective_flops(model, settings, data.context_length).training
    total_steps = settings.total_steps(data.context_length, flops)
    identity = RunIdentity.of(stage_name, settings, data.fingerprint, data_position, model.config)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive(output_dir), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.nn.Module.to(model, device)
        state = TrainingState(
            model=model,
            optimizer=build_optimizer(model, settings),
            hooks=hooks,
            guard=Guard(settings.guard),
            start_position=data_position,
            data_position=data_position,
        )
        tokenizer = data.tokenizer() if tokenizer is None else tokenizer
        loop = _Loop(state, data, settings, output_dir, identity, total_steps, flops, tokenizer, ledger)
        return loop.run(optimizer_from, stop_after, progress)


class _Loop:
    """One call of `train`."""

    def __init__(
        self,
        state: TrainingState,
        data: PackedData,
        settings: TrainingSettings,
        output_dir: Path,
        identity: RunIdentity,
        total_steps: int,
        flops_per_token: float,
        tokenizer: PreTrainedTokenizerBase | None,
        ledger: Ledger | None,
    ) -> None:
        self.state = state
        self.data = data
        self.settings = settings
        self.output_dir = output_dir
        self.identity = identity
        self.total_steps = total_steps
        self.tokens_per_step = settings.batch_size * data.context_length
        self.flops_per_token = flops_per_token
        self.tokenizer = tokenizer
        self.parent = ledger or Ledger()
        self.model = state.model
        self.device = state.model.device
        self.corruption = settings.corruption(state.model.config, data.vocab_size, data.context_length)
        self.precision = choose_precision(settings.precision, self.device)
        self.peak = peak_flops(self.device, self.precision)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.num_parameters = count_parameters(self.model).total

    # The course of a call.

    def run(self, optimizer_from: str | Path | None, stop_after: int | None, progress: bool) -> TrainingResult:
        """Start or resume, train, evaluate, save."""
        self.clock = time.perf_counter()
        checkpoint = latest_checkpoint(self.output_dir)
        for hook in self.state.hooks:
            hook.attach(self.model, self.state.optimizer)
        groups = self.state.optimizer.param_groups
        # A hook may have given some parameters a rate of their own; it stays in proportion to the schedule's.
        self.relative_rates = [group["lr"] / self.settings.learning_rate for group in groups]
        if checkpoint is not None:
            saved = self._resume(checkpoint)
            # A kill may have come between naming the checkpoint and removing what it made superfluous.
            self._prune(checkpoint)
            if saved["finished"]:
                return self._result(checkpoint, self.parent.stages[-1].loss_after, self.parent)
        else:
            self._start(optimizer_from)
        was_training = self.model.training
        step, position = self.state.step, self.state.data_position
        self.metrics = MetricsLog(
            self.output_dir, self.settings.tensorboard, None if checkpoint is None else position, step
        )
        self.display = ProgressDisplay(self.identity.stage_name, self.total_steps, step, progress)
        try:
            with Interruption() as interruption:
                if checkpoint is None:
                    self._begin()
                result = self._train(interruption, stop_after)
            # In the last step or while the end was measured and saved: who asked to stop wants no next stage.
            if interruption.signal_name is not None:
                self._interrupted(interruption.signal_name)
            return result
        finally:
            self.display.close()
            self.metrics.close()
            self.model.train(was_training)

    def _start(self, optimizer_from: str | Path | None) -> None:
        state = self.state
        if optimizer_from is not None:
            fresh = restore_optimizer(self.model, state.optimizer, read_tensors(optimizer_from))
            if fresh:
                state.notes.append(f"{len(fresh)} parameters start with fresh moments: {', '.join(fresh)}")
        self._draw_from(state.data_position)
        torch.manual_seed(self.settings.seed)

    def _begin(self) -> None:
        """Evaluate and save the untrained state: the guard needs a way back, and a disk that is full shows at once."""
        loss = self._evaluate(self.settings.evaluation_batches)
        if self.settings.evaluation_batches is None:
            # The books set it beside the final loss, which is that of the whole split.
            self.state.loss_before = loss
        self._log({"validation_loss": loss})
        self._save()

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        saved = read_state(checkpoint)
        try:
            notes = self.identity.check(RunIdentity.model_validate(saved["identity"]), str(self.output_dir))
            self.parent = Ledger.load(checkpoint)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint} has no usable training state: {error}") from error
        self._load(checkpoint, saved)
        if not saved["finished"]:
            self._book_lost_work(checkpoint, saved)
            # The record of the stage in progress is written anew with every checkpoint.
            self.parent = Ledger(stages=self.parent.stages[:-1])
        self.state.notes += notes
        return saved

    def _book_lost_work(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Add the time that a killed process spent after the checkpoint to its state, as far as the metrics tell.

        Written to the disk before the metrics beyond the checkpoint are dropped: the next kill may come at any moment.
        """
        state = self.state
        seconds, position = last_progress(self.output_dir)
        steps, more = position - state.data_position, seconds - state.seconds
        if steps <= 0 or more <= 0:
            return
        state.seconds = seconds
        state.notes.append(
            f"resumed at step {state.step}; at least {steps} steps after it were lost and done again ({more:.1f} s; "
            "their FLOPs are not in the totals)"
        )
        values = {**saved["state"], "seconds": state.seconds, "notes": state.notes}
        rewrite_state(checkpoint, {**saved, "state": values})

    def _load(self, checkpoint: Path, saved: dict[str, Any], position: int | None = None) -> None:
        """Go back to a checkpoint; draw batches from `position` on (None: from the checkpoint's)."""
        load_weights(checkpoint, self.model)
        self.state.load_values(saved["state"])
        if position is not None:
            self.state.data_position = position
        self._draw_from(self.state.data_position)
        self.state.load_tensors(read_tensors(checkpoint))

    def _train(self, interruption: Interruption, stop_after: int | None) -> TrainingResult:
        state, settings = self.state, self.settings
        last = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        self.model.train()
        self._reset_speed()
        while state.step < last:
            if interruption.signal_name is not None:
                self._interrupted(interruption.signal_name)
            if not self._step():
                continue
            step = state.step
            if step % settings.log_interval == 0 or step == self.total_steps:
                self._log(self._measurements())
            if step == self.total_steps:
                break
            if settings.evaluation_interval is not None and step % settings.evaluation_interval == 0:
                with self._off_the_clock():
                    loss = self._evaluate(settings.evaluation_batches)
                    self._log({"validation_loss": loss})
                    self.display.show_validation(loss)
            if self._checkpoint_due():
                with self._off_the_clock():
                    self._save()
        if state.step < self.total_steps:
            return self._result(self._save_unplanned(), None, self._books(None))
        loss = self._evaluate(None)
        self._log({"validation_loss": loss})
        checkpoint = self._save(loss)
        self.display.line(f"{state.step} steps done, validation loss {loss:.4f}, saved in {checkpoint}")
        return self._result(checkpoint, loss, self._books(loss))

    # One step.

    def _step(self) -> bool:
        """Draw a batch and learn from it; return whether the step counter moved on (not so after a rewind)."""
        state, settings = self.state, self.settings
        rate = learning_rate(settings, state.step, self.total_steps)
        for group, relative in zip(state.optimizer.param_groups, self.relative_rates, strict=True):
            group["lr"] = rate * relative
        for hook in state.hooks:
            hook.before_step(state.step)
        contexts = next(self.batches)["input_ids"]
        batch = model_inputs(contexts, self.corruption, settings.seed, state.data_position)
        state.data_position += 1
        loss, norm = self._gradients(batch)
        self.rate, self.norm = rate, norm
        problem = state.guard.problem(loss, norm)
        if problem is not None:
            return self._bad_step(problem)
        state.optimizer.step()
        for hook in state.hooks:
            hook.after_step(state.step)
        state.guard.accept(loss)
        state.loss_sum += loss
        state.loss_count += 1
        state.step += 1
        self.display.update(state.step, loss, self._tokens_per_second())
        return True

    def _gradients(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Leave the clipped gradients of the mean loss over the batch's tokens; return loss and norm before clipping.

        Every context predicts equally many tokens, so weighing a micro-batch by its contexts weighs every token alike.
        """
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            batch = {name: ids.pin_memory().to(self.device, non_blocking=True) for name, ids in batch.items()}
        losses, size = [], self.settings.sequences_per_forward
        for inputs, labels in zip(batch["input_ids"].split(size), batch["labels"].split(size), strict=True):
            share = len(inputs) / self.settings.batch_size
            with self._autocast():
                loss = self.forward(input_ids=inputs, labels=labels, use_cache=False).loss * share
            loss.backward()
            losses.append(loss.detach())
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.gradient_clip is not None:
            clip_grads_with_norm_(self.parameters, self.settings.gradient_clip, norm)
        # One transfer, so that CUDA is waited for once per step.
        values = torch.stack([torch.stack(losses).sum(), norm.to(losses[0].dtype)]).tolist()
        return values[0], values[1]

    def _bad_step(self, problem: str) -> bool:
        state, action = self.state, self.settings.guard.action
        state.optimizer.zero_grad(set_to_none=True)
        event = GuardEvent(
            step=state.step,
            data_position=state.data_position - 1,
            reason=problem,
            action=action,
            rewound_to=state.rewind_step if action == "rewind" else None,
        )
        too_many = state.guard.record(event)
        self._log({"event": action, "reason": problem, "bad_step": event.step, "rewound_to": event.rewound_to})
        self.display.line(str(event))
        if too_many:
            raise TrainingError(
                f"Training stopped at step {state.step}: more than {self.settings.guard.maximum_events} bad steps "
                f"within {self.settings.guard.window} batches; the last: {problem}. The last good weights are in "
                f"{latest_checkpoint(self.output_dir)}. Lower learning_rate or look at the batches named in "
                f"{self.metrics.path}; if the data is right and the spikes harmless, raise guard.spike_multiple or "
                "guard.maximum_events (--set training.guard.maximum_events=50) and give the same output folder again."
            )
        if action == "rewind":
            self._rewind()
            return False
        state.step += 1
        return True

    def _rewind(self) -> None:
        """Go back to the last periodic checkpoint, and on with the batch after the bad one."""
        state = self.state
        events, notes = state.guard.events, state.notes
        seconds = state.seconds
        checkpoint = self.output_dir / CHECKPOINTS / checkpoint_name(state.rewind_step)
        self.metrics.rewind(state.rewind_step)
        # Before any newer checkpoint (of an interruption) is forgotten, `latest` must not name it any more.
        name_latest(self.output_dir, checkpoint)
        self._load(checkpoint, read_state(checkpoint), position=state.data_position)
        state.guard.events, state.notes, state.seconds = events, notes, seconds
        self._prune(checkpoint)

    # Saving and measuring.

    def _checkpoint_due(self) -> bool:
        interval = self.settings.checkpoint_interval
        events = self.state.guard.events
        just_bad = bool(events) and events[-1].data_position == self.state.data_position - 1
        # A state is worth keeping after a good step only.
        return interval is not None and self.state.step % interval == 0 and not just_bad

    def _save_unplanned(self) -> Path:
        """Save between two periodic checkpoints; a rewind will not go there, as it would not without this one."""
        newest = latest_checkpoint(self.output_dir)
        if newest is not None and newest.name == checkpoint_name(self.state.step):
            return newest
        return self._save(periodic=False)

    def _save(self, final_loss: float | None = None, periodic: bool = True) -> Path:
        state = self.state
        if periodic:
            state.rewind_step = state.step
        checkpoint = self.output_dir / CHECKPOINTS / checkpoint_name(state.step)
        self._tick()
        write_checkpoint_folder(
            checkpoint,
            self.model,
            tokenizer=self.tokenizer,
            ledger=self._books(final_loss),
            tensors=state.tensors(),
            state={
                "version": 1,
                "finished": final_loss is not None,
                "total_steps": self.total_steps,
                "identity": self.identity.model_dump(),
                "state": state.values(),
            },
        )
        name_latest(self.output_dir, checkpoint)
        self._prune(checkpoint)
        return checkpoint

    def _prune(self, newest: Path) -> None:
        names = sorted(folder.name for folder in newest.parent.glob("step-*") if folder.name <= newest.name)
        keep = {*names[-self.settings.keep_checkpoints :], checkpoint_name(self.state.rewind_step)}
        prune_checkpoints(self.output_dir, keep)

    def _interrupted(self, signal_name: str) -> None:
        checkpoint = self._save_unplanned()
        done = "the stage is finished and saved" if self.state.step == self.total_steps else "saved"
        raise TrainingInterrupted(
            f"Interrupted by {signal_name} after step {self.state.step} of {self.total_steps}; {done} in {checkpoint}. "
            f"Give the same command (or call train with the same output_dir, {self.output_dir}) to go on from there.",
            checkpoint,
        )

    def _books(self, final_loss: float | None) -> Ledger:
        """The parent's books with a record of this stage as it stands."""
        state = self.state
        record = StageRecord(
            name=self.identity.stage_name,
            kind="train",
            parameters=self.num_parameters,
            tokens=self._tokens(),
            flops=self._flops(),
            seconds=state.seconds,
            loss_before=state.loss_before,
            loss_after=final_loss,
            data_fingerprint=self.identity.data_fingerprint,
            seed=self.settings.seed,
            started_at=state.started_at,
            notes=[*state.notes, *(f"guard: {event}" for event in state.guard.events)],
        )
        return self.parent.append(record)

    def _tokens(self) -> int:
        # Positions, not steps: a batch whose step was skipped or rewound was paid for too.
        return (self.state.data_position - self.state.start_position) * self.tokens_per_step

    def _flops(self) -> float:
        return self._tokens() * self.flops_per_token

    def _result(self, checkpoint: Path, final_loss: float | None, ledger: Ledger) -> TrainingResult:
        state = self.state
        return TrainingResult(
            checkpoint,
            final_loss,
            self._tokens(),
            self._flops(),
            state.seconds,
            state.step,
            state.data_position,
            ledger,
        )

    def _evaluate(self, batches: int | None) -> float:
        with self._autocast():
            size = self.settings.sequences_per_forward
            return evaluate_loss(self.model, self.data.validation, size, batches, self.corruption)

    def _measurements(self) -> dict[str, Any]:
        """Loss (mean over the good steps since the last line), rate, gradient norm and speed."""
        state = self.state
        speed = self._tokens_per_second()
        flops = speed * self.flops_per_token
        mean = state.loss_sum / state.loss_count if state.loss_count else math.nan
        state.loss_sum, state.loss_count = 0.0, 0
        self._reset_speed()
        values = {
            "loss": mean,
            "learning_rate": self.rate,
            "gradient_norm": self.norm,
            "tokens_per_second": speed,
            "flops_per_second": flops,
        }
        return values if self.peak is None else {**values, "mfu": flops / self.peak}

    def _log(self, values: dict[str, Any]) -> None:
        self._tick()
        state = self.state
        self.metrics.write(
            {
                "step": state.step,
                "data_position": state.data_position,
                "tokens": self._tokens(),
                "flops": self._flops(),
                "seconds": round(state.seconds, 3),
                **values,
            }
        )

    # Time.

    def _tick(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now

    def _reset_speed(self) -> None:
        self.speed_since, self.speed_position, self.pause = time.perf_counter(), self.state.data_position, 0.0

    def _tokens_per_second(self) -> float:
        batches = self.state.data_position - self.speed_position
        elapsed = time.perf_counter() - self.speed_since - self.pause
        return batches * self.tokens_per_step / max(elapsed, 1e-9)

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Evaluations and checkpoints do not count as training in tokens per second."""
        started = time.perf_counter()
        yield
        self.pause += time.perf_counter() - started

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _draw_from(self, position: int) -> None:
        loader = make_loader(self.data.train, self.settings.batch_size, self.settings.seed, position=position)
        self.batches = iter(loader)


@contextlib.contextmanager
def _exclusive(output_dir: Path) -> Iterator[None]:
    """Hold the run's folder: two processes that train into one would mix their checkpoints. Freed also by a kill."""
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{output_dir} is in use: another process trains into it. Wait for it or choose another folder."
            ) from error
        yield
