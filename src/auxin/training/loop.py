"""The training loop of one stage: steps, evaluations, checkpoints, resumption."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from auxin.accounting.ledger import Ledger
from auxin.accounting.machine import choose_device
from auxin.accounting.parameters import count_parameters
from auxin.accounting.recomputation import RECOMPUTATION_NOTE, check_recomputable, recomputed
from auxin.data.dataset import Dataset, Processor
from auxin.errors import CheckpointError, TrainingError
from auxin.interruption import Interruption, TrainingInterrupted
from auxin.locks import exclusive
from auxin.models.fingerprint import weights_fingerprint
from auxin.nn.autocast import without_autocast
from auxin.objectives.measures import Loss, Measure
from auxin.objectives.objective import Objective, ObjectiveSettings, References, training_noise
from auxin.planning.hooks import Hook
from auxin.training.batch_norms import batch_norms, normed_together
from auxin.training.batches import Batches
from auxin.training.books import Books, Rates
from auxin.training.checkpoint import load_weights, read_state, stored_moments, stored_training
from auxin.training.fit import check_fit, refuse_non_finite
from auxin.training.gradients import BatchGradients
from auxin.training.guard import Guard, GuardEvent
from auxin.training.hardware import peak_flops
from auxin.training.held_out import HeldOut, SharedAmong
from auxin.training.identity import RunIdentity
from auxin.training.keeper import Keeper
from auxin.training.optimizer import build_optimizer, restore_optimizer
from auxin.training.progress import Place, ProgressDisplay, TimeLeft
from auxin.training.ranks import ALONE, Ranks, speaks
from auxin.training.result import TrainingResult
from auxin.training.saving import Saver
from auxin.training.schedule import learning_rate
from auxin.training.settings import TrainingSettings
from auxin.training.speed import Speed
from auxin.training.state import TrainingState
from auxin.training.strategies import Copies
from auxin.training.tensor_parallel import choose_any_strategy

T = TypeVar("T")


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: PreTrainedModel,
    data: Dataset,
    settings: TrainingSettings,
    output_dir: str | Path,
    *,
    measures: Sequence[Measure] = (),
    measured_objective: ObjectiveSettings | None = None,
    references: References | None = None,
    processor: Processor | None = None,
    optimizer_from: str | Path | None = None,
    ledger: Ledger | None = None,
    hooks: Sequence[Hook] = (),
    stage_name: str = "train",
    stop_after: int | None = None,
    data_position: int = 0,
    progress: bool = True,
    place: Place | None = None,
    ranks: Ranks = ALONE,
) -> TrainingResult:
    """Train a model for one stage, in place; resume where `output_dir` holds a started run.

    The same call with the same seed on the same machine with the same number of threads gives the same bits, whether it
    was killed and resumed or left alone. On CUDA this holds as far as the kernels are deterministic: see
    `torch.use_deterministic_algorithms`, which is left to the caller. The caller's random state is left alone;
    his contexts (autocast, no_grad, inference_mode) don't reach inside.

    Args:
        model: any Hugging Face model that can learn the objective of the settings, with float32 weights; it is moved to
            the device of the settings. Of one with a PEFT adapter (`add_adapter`) checkpoints hold the adapter alone.
        data: its split `train` is learnt, `validation` evaluated.
        settings: the stage's settings.
        output_dir: gets `checkpoints/`, `latest`, `metrics.jsonl` and `tensorboard/`.
        measures: what is measured on the held-out split; the first one on the way too, all of them at the end. Default:
            the loss.
        measured_objective: what the measures are of; default: what is learnt.
        references: other models that the objective goes by, by the names that it gives; those that are folders are
            read where they are left out.
        processor: saved with each checkpoint; None takes the data's.
        optimizer_from: a checkpoint whose AdamW moments are taken over; the schedule starts anew. None: fresh moments.
        ledger: the parent's books; None starts new ones.
        hooks: see `Hook`; resumed with the run.
        stage_name: of the ledger's record.
        stop_after: save and return after this many steps of the stage; calling again goes on.
        data_position: batch of the data order to start at, so that a stage need not see again what its parent saw.
        progress: show the progress on standard error.
        place: where the stage stands in a run of several, for the progress.
        ranks: the processes that train together (`auxin.training.ranks.joined`); each calls this with the same
            arguments and sees the same files, of which the leader writes all.

    Raises:
        ConfigError: settings, model and data do not fit together.
        CheckpointError: the run in `output_dir` is another one, or none of its checkpoints is whole; weights or moments
            are not finite; a checkpoint can't be written.
        DataError: a batch can't be read; what was learnt before is saved.
        TrainingError: too many bad steps; the checkpoint named in `latest` is good.
        TrainingInterrupted: a signal came (`auxin.interruption`); the state was saved.
    """
    output_dir = Path(output_dir)
    form = data.form
    with ranks.together():
        device = choose_device(settings.device)
        objective = settings.objective.bind(model.config, form, references)
        check_fit(model, objective)
        if settings.activation_checkpointing:
            check_recomputable(model)
        for name, reference in (references or {}).items():
            refuse_non_finite(reference.model, None, name)
        measured = objective if measured_objective is None else measured_objective.bind(model.config, form, references)
        flops = objective.training_flops(model)
        total_steps = settings.total_steps(form, flops)
        strategy = choose_any_strategy(settings, ranks, device, model, objective, hooks)
    facts = objective.identity()
    # A setting that may change elsewhere, and here is part of what is learnt.
    if not objective.adds_up or batch_norms(model):
        facts["samples per forward pass"] = str(settings.samples_per_forward)
    identity = RunIdentity.of(stage_name, settings, data.fingerprint, data_position, model.config, facts)
    if ranks.several:
        ranks.same("The settings, data or config", identity.model_dump_json())
        ranks.same("The devices, or the processes of a machine (LOCAL_WORLD_SIZE),", strategy.name)
        ranks.same("The weights", weights_fingerprint(model))
    with contextlib.ExitStack() as held:
        with ranks.together():
            output_dir.mkdir(parents=True, exist_ok=True)
            if ranks.leads:
                held.enter_context(exclusive(output_dir))
        held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.nn.Module.to(model, device)
        num_parameters = count_parameters(model).total
        strategy.place(model)
        state = TrainingState(
            model=model,
            optimizer=build_optimizer(model, settings),
            hooks=hooks,
            guard=Guard(settings.guard),
            start_position=data_position,
            data_position=data_position,
        )
        evaluation = HeldOut(
            *(tuple(measures) or (Loss(),), measured, data, settings.samples_per_forward, settings.evaluation_batches),
            sharing=SharedAmong(strategy),
        )
        processor = data.processor() if processor is None else processor
        keeper = Keeper(output_dir, ranks, settings.keep_checkpoints, settings.tensorboard)
        loop = _Loop(
            *(state, data, objective, evaluation, settings, keeper, strategy),
            *(identity, total_steps, flops, num_parameters, processor, ledger or Ledger()),
        )
        with (
            objective.learning(model),
            without_autocast(),
            recomputed(model, settings.activation_checkpointing),
            normed_together(model, ranks if strategy.shares_passes else ALONE),
        ):
            return loop.run(optimizer_from, stop_after, progress, place or Place())


class _Loop:
    """One call of `train`."""

    def __init__(
        self,
        state: TrainingState,
        data: Dataset,
        objective: Objective,
        evaluation: HeldOut,
        settings: TrainingSettings,
        keeper: Keeper,
        strategy: Copies,
        identity: RunIdentity,
        total_steps: int,
        flops_per_sample: float,
        num_parameters: int,
        processor: Processor | None,
        ledger: Ledger,
    ) -> None:
        self.state = state
        self.data = data
        self.form = data.form
        self.objective = objective
        self.evaluation = evaluation
        self.settings = settings
        self.keeper = keeper
        self.identity = identity
        self.total_steps = total_steps
        self.flops_per_sample = flops_per_sample
        self.model = state.model
        self.device = state.model.device
        self.strategy, self.ranks = strategy, strategy.ranks
        self.saver = Saver(keeper, strategy, processor)
        self.gradients = BatchGradients(self.model, objective, settings, strategy)
        peak = peak_flops(self.device, self.gradients.precision)
        rates = Rates(settings.batch_size, flops_per_sample, None if peak is None else peak * self.ranks.size)
        self.books = Books(state, identity, self.form, rates, num_parameters, evaluation.measures, ledger)

    # The course of a call.

    def run(
        self, optimizer_from: str | Path | None, stop_after: int | None, progress: bool, place: Place
    ) -> TrainingResult:
        """Start or resume, train, evaluate, save."""
        self.books.open()
        checkpoint, gone_back = self.keeper.to_resume(self.settings.guard.action == "rewind")
        for hook in self.state.hooks:
            hook.attach(self.model, self.state.optimizer)
        groups = self.state.optimizer.param_groups
        # A hook may have given some parameters a rate of their own; it stays in proportion to the schedule's.
        self.relative_rates = [group["lr"] / self.settings.learning_rate for group in groups]
        saved: dict[str, Any] = {}
        with self.ranks.together():  # what one can't read ends all of them
            if checkpoint is None:
                self._start(optimizer_from)
            else:
                saved = self._resume(checkpoint)
        if checkpoint is not None:
            gone_back += self._keep_later(checkpoint)
            # A kill may have come between naming the checkpoint and removing what it made superfluous.
            self.keeper.prune(checkpoint, self.state.rewind_step)
            if saved["finished"]:
                found = self.books.parent.stages[-1].measures
                none = math.nan  # as JSON says it
                measured = {kind: none if value is None else value for kind, value in found.items()}
                return self.books.result(checkpoint, measured, self.books.parent)
        else:
            gone_back += self._keep_later(None)
        refuse_non_finite(self.model, self.state.optimizer, str(checkpoint or self.model.name_or_path or "the model"))
        self._note_processes(checkpoint is not None)
        was_training = self.model.training
        step, position = self.state.step, self.state.data_position
        self.keeper.open_metrics(None if checkpoint is None else position, step)
        self.display = self._display(progress and self.ranks.leads, place)
        self.evaluation = dataclasses.replace(self.evaluation, told=self.display.evaluating)
        for note in gone_back:
            self.display.line(note)
        if checkpoint is not None:
            self.display.line(f"goes on from step {step} of {self.total_steps}, saved in {checkpoint}")
        try:
            with Interruption(says=speaks()) as interruption:
                if checkpoint is None:
                    self._begin()
                result = self._train(interruption, stop_after)
            # In the last step or while the end was measured and saved: who asked to stop wants no next stage.
            if self.ranks.any(interruption.signal_name is not None):
                self._interrupted(interruption.signal_name or "a signal to another process")
            return result
        finally:
            self.display.close()
            self.batches.close()
            self.saver.close()
            self.keeper.close()
            self.model.train(was_training)

    def _note_processes(self, resumed: bool) -> None:
        """Say in the books how many processes train from here on, where they are several, or others than before, and
        that layers are computed again."""
        if self.settings.activation_checkpointing and RECOMPUTATION_NOTE not in self.state.notes:
            self.state.notes.append(RECOMPUTATION_NOTE)
        words = f"{self.ranks.size} process{'es' if self.ranks.several else ''}"
        now = f"trained by {words}{f' ({self.strategy.name})' if self.ranks.several else ''}"
        before = [note.partition(" from step ")[0] for note in self.state.notes if note.startswith("trained by ")]
        if (before and before[-1] != now) or (not before and self.ranks.several):
            self.state.notes.append(f"{now} from step {self.state.step}" if resumed else now)

    def _display(self, enabled: bool, place: Place) -> ProgressDisplay:
        flops = self.settings.batch_size * self.flops_per_sample
        left = TimeLeft(self.total_steps, flops, self.evaluation.last_samples, place.flops_after)
        name, unit, measure = self.identity.stage_name, self.form.unit, self.evaluation.measures[0].name
        return ProgressDisplay(name, self.total_steps, self.state.step, enabled, unit, measure, place, left)

    def _start(self, optimizer_from: str | Path | None) -> None:
        state = self.state
        self.keeper.start_over()
        if optimizer_from is not None:
            fresh = restore_optimizer(self.model, state.optimizer, stored_moments(optimizer_from))
            if fresh:
                state.notes.append(f"{len(fresh)} parameters start with fresh moments: {', '.join(fresh)}")
        self._draw_from(state.data_position)
        torch.manual_seed(self.settings.seed)

    def _begin(self) -> None:
        """Evaluate and save the untrained state: the guard needs a way back, and a disk that is full shows at once."""
        value = self._evaluate()
        if self.evaluation.part is None:
            # The books set it beside the final value, which is that of the whole split.
            self.state.value_before = value
        self._save()
        self.saver.settle()

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        saved = read_state(checkpoint)
        try:
            notes = self.identity.check(RunIdentity.model_validate(saved["identity"]), str(self.keeper.folder))
            self.books.go_on_from(Ledger.load(checkpoint), saved["finished"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint} has no usable training state: {error}") from error
        self._load(checkpoint, saved)
        self.keeper.pick_up(checkpoint, self.state)
        self.state.notes += notes
        return saved

    def _keep_later(self, checkpoint: Path | None) -> list[str]:
        notes = self.keeper.keep_later(checkpoint)
        self.state.notes += [note for note in notes if note not in self.state.notes]
        return notes

    def _load(self, checkpoint: Path, saved: dict[str, Any], position: int | None = None) -> None:
        """Go back to a checkpoint; draw batches from `position` on (None: from the checkpoint's)."""
        load_weights(checkpoint, self.model)
        self.state.load_values(saved["state"])
        if position is not None:
            self.state.data_position = position
        self._draw_from(self.state.data_position)
        self.state.load_tensors(stored_moments(checkpoint), stored_training(checkpoint))

    def _train(self, interruption: Interruption, stop_after: int | None) -> TrainingResult:
        state, settings = self.state, self.settings
        last = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        self.model.train()
        self.speed = Speed(self.books.units_per_step, state.data_position)
        while state.step < last:
            self.saver.look()
            self.ranks.begin_step(state.step)
            with self.speed.drawing():
                self.batches.draw()
            if self.ranks.any(self.batches.unread is not None or interruption.signal_name is not None):
                checkpoint, done = self._save_unplanned(), f"after step {state.step} of {self.total_steps}"
                with self.ranks.together():
                    self.batches.refuse_unread(done, checkpoint)
                self._interrupted(interruption.signal_name or "a signal to another process")
            if not self._step():
                continue
            step = state.step
            if step % settings.log_interval == 0 or step == self.total_steps:
                self._log(self.books.measurements(self.speed, self.rate, self.norm))
            if step == self.total_steps:
                break
            if settings.evaluation_interval is not None and step % settings.evaluation_interval == 0:
                with self.speed.paused():
                    self.saver.settle()  # what is written by now is not to be lost by what comes
                    self.display.show_validation(self._evaluate())
            if self._checkpoint_due():
                with self.speed.paused():
                    self._save()
        if state.step < self.total_steps:
            return self.books.result(self._save_unplanned(), {})
        self.saver.settle()
        found = self._measured(self.evaluation.all)
        self._log(self._measured(partial(self.evaluation.last_line, found=found)))
        checkpoint = self._save(found)
        shown = ", ".join(f"{measure.name} {found[measure.kind]:.4f}" for measure in self.evaluation.measures)
        self.display.line(f"{state.step} steps done, validation {shown}, saved in {checkpoint}")
        return self.books.result(checkpoint, found)

    # One step.

    def _step(self) -> bool:
        """Learn from the batch that was drawn; return whether the step counter moved on (not so after a rewind)."""
        state, settings = self.state, self.settings
        seed = self._draws()
        rate = learning_rate(settings, state.step, self.total_steps)
        for group, relative in zip(state.optimizer.param_groups, self.relative_rates, strict=True):
            group["lr"] = rate * relative
        for hook in state.hooks:
            hook.before_step(state.step)
        noise = training_noise(settings.seed, state.data_position)
        with self.speed.drawing():
            inputs = self.objective.inputs(self.batches.batch, noise)
        state.data_position += 1
        loss, norm = self.gradients.of(inputs, seed)
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
        self.display.update(state.step, loss, self.speed.units_per_second(state.data_position))
        return True

    def _bad_step(self, problem: str) -> bool:
        state, action = self.state, self.settings.guard.action
        self.saver.settle()  # what follows goes back to it, or ends with it
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
                f"{self.keeper.latest()}. Lower learning_rate or look at the batches named in "
                f"{self.keeper.metrics_path}; if the data is right and the spikes harmless, raise "
                "guard.spike_multiple or guard.maximum_events (--set training.guard.maximum_events=50) and give the "
                "same output folder again."
            )
        if action == "rewind":
            self._rewind()
            return False
        state.step += 1
        if state.step == self.total_steps:
            for hook in state.hooks:
                hook.before_step(state.step)
        return True

    def _rewind(self) -> None:
        """Go back to the last periodic checkpoint, and on with the batch after the bad one."""
        state = self.state
        events, notes = state.guard.events, state.notes
        seconds = state.seconds
        checkpoint, saved = self.keeper.go_back(state.rewind_step)
        with self.ranks.together():
            self._load(checkpoint, saved, position=state.data_position)
        state.guard.events, state.notes, state.seconds = events, notes, seconds
        self.keeper.prune(checkpoint, state.rewind_step)

    # Saving and measuring.

    def _checkpoint_due(self) -> bool:
        interval = self.settings.checkpoint_interval
        events = self.state.guard.events
        just_bad = bool(events) and events[-1].data_position == self.state.data_position - 1
        # A state is worth keeping after a good step only.
        return interval is not None and self.state.step % interval == 0 and not just_bad

    def _save_unplanned(self) -> Path:
        """Save between two periodic checkpoints; a rewind will not go there, as it would not without this one."""
        self.saver.settle()
        if self.keeper.newest_is(self.state.step):
            return self.keeper.checkpoint(self.state.step)
        checkpoint = self._save(periodic=False)
        self.saver.settle()
        return checkpoint

    def _save(self, final: dict[str, float] | None = None, periodic: bool = True) -> Path:
        state = self.state
        if periodic:
            state.rewind_step = state.step
        self.books.tick()
        values = {
            "version": 1,
            "finished": final is not None,
            "total_steps": self.total_steps,
            "identity": self.identity.model_dump(),
            "state": state.values(),
        }
        return self.saver.save(state, self.books.ledger(final or {}), values, is_last=final is not None)

    def _interrupted(self, signal_name: str) -> None:
        checkpoint = self._save_unplanned()
        done = "the stage is finished and saved" if self.state.step == self.total_steps else "saved"
        raise TrainingInterrupted(
            f"Interrupted by {signal_name} after step {self.state.step} of {self.total_steps}; {done} in {checkpoint}. "
            f"Give the same command (or call train with the same output_dir, {self.keeper.folder}) to go on from "
            "there.",
            checkpoint,
        )

    def _evaluate(self) -> float:
        value = self._measured(self.evaluation.first)
        self._log(self.evaluation.line(value))
        return value

    def _measured(self, measure: Callable[[PreTrainedModel], T]) -> T:
        """What `measure` finds of the model, in the precision that it is trained in."""

        def found() -> T:
            with self.gradients.autocast():
                return measure(self.model)

        return self.strategy.measured(self.model, found)

    def _draws(self) -> int:
        """The seed of what several processes draw in the forward passes of the next step, and set as torch's, so that
        they draw alike what is drawn outside of them."""
        if not self.ranks.several:
            return 0
        seed = int(training_noise(self.settings.seed, self.state.data_position + 1).integers(2**62))
        torch.manual_seed(seed)
        return seed

    def _log(self, values: dict[str, Any]) -> None:
        self.keeper.write(self.books.line(values))

    def _draw_from(self, position: int) -> None:
        self.batches = Batches(self.data, self.settings, position)
