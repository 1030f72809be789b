"""Trains in several forked processes together on request: see fork_server.py, of which this is the other half.

Reads one JSON request per line from standard input, and answers with the exit code and the message of each process.
"""

import ctypes
import errno
import hashlib
import json
import math
import os
import platform
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from auxin.accounting.recomputation import recomputed
from auxin.errors import AuxinError, CheckpointError, ConfigError
from auxin.models import TokenFormerForCausalLM
from auxin.models.pieces import write_pieces
from auxin.objectives.measures import Accuracy, Loss, MacroF1
from auxin.training import loop, saving, train
from auxin.training.divided_linear import DividedLinear
from auxin.training.gradients import BatchGradients
from auxin.training.held_out import HeldOut, SharedAmong
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import Ranks, joined
from auxin.training.strategies import choose_strategy, whole
from auxin.training.tensor_parallel import Split, choose_any_strategy
from training.tiny import (
    NORMED,
    VOCABULARY,
    TinyData,
    bits,
    poisoned,
    tiny_gpt2,
    tiny_llama,
    tiny_settings,
    tiny_tokenformer,
    wide_llama,
)


def masked_bert() -> BertForMaskedLM:
    """Micro-batches of its objective have unequal numbers of targets."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokens = {"vocab_size": VOCABULARY + 1, "max_position_embeddings": 16, "pad_token_id": 0}
    return BertForMaskedLM(BertConfig(**sizes, **dropout, **tokens))


def loss_in_the_models_precision(logits: Tensor, labels: Tensor, *unused: object, **named: object) -> Tensor:
    """A language model's loss. transformers' own is in single precision, as are the norms and the rotation of a Llama,
    which is no model to compare in double precision for that: optimizers make much of rounding."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, biases, one embedding": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {}),
}


def small(family: str, **changes: object) -> PreTrainedModel:
    """Of four heads that share two of keys and values, and a vocabulary that no number of processes divides."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY + 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config, model, own = FAMILIES[family]
    return model(config(**{**sizes, **heads, **tokens, **own, **changes}))


class Scarce(GPT2LMHeadModel):
    """`odd` gets a gradient from parts of a batch whose first token is odd, `never` from none; `factor`, if there is
    one, is a single number."""

    def __init__(self, factor: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(tiny_gpt2(dropout=0.0).config)
        self.odd, self.never = nn.Parameter(torch.zeros(VOCABULARY)), nn.Parameter(torch.ones(3, 4))
        if factor:
            self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> CausalLMOutputWithCrossAttentions:
        output = super().forward(input_ids=input_ids, **kwargs)
        counted = isinstance(input_ids, FakeTensor) or input_ids.is_meta
        if self.training and not counted and input_ids[0, 0] % 2:
            output.logits = output.logits + self.odd
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


class Normed(GPT2LMHeadModel):
    """Channels of logits go through batch norms: over samples and places, and over samples alone. Of these there are
    two in a pass at least, whose difference a small epsilon would make 1 however small it is, rounding and all."""

    def __init__(self, **settings: object) -> None:
        torch.manual_seed(0)
        super().__init__(tiny_gpt2(dropout=0.0).config)
        self.over_places, self.over_samples = nn.BatchNorm1d(VOCABULARY, **settings), nn.BatchNorm1d(VOCABULARY, 1.0)
        for norm in (self.over_places, self.over_samples):
            if norm.affine:
                nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> CausalLMOutputWithCrossAttentions:
        output = super().forward(input_ids=input_ids, **kwargs)
        logits = self.over_places(output.logits.transpose(1, 2)).transpose(1, 2)
        output.logits = logits + self.over_samples(output.logits[:, 0])[:, None]
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


def strided_llama() -> LlamaForCausalLM:
    """One of its matrices lies in memory column by column."""
    model = tiny_llama()
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().t().contiguous().t())
    return model


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_gpt2(dropout=0.0),
    "tokenformer": tiny_tokenformer,
    "normed": lambda: tiny_tokenformer(**NORMED),
    "frozen": lambda: frozen(tiny_tokenformer(**NORMED)),
    "poisoned_tokens": lambda: poisoned(tiny_tokenformer(**NORMED)),
    "dropped": lambda: dropped(tiny_tokenformer(**NORMED)),
    "softmax": lambda: tiny_tokenformer(ffn_score_function="softmax"),
    "biased": lambda: small("llama, biases, one embedding"),
    "qwen3": lambda: small("qwen3"),
    "dropping": lambda: small("llama", attention_dropout=0.1),
    "experts": lambda: small("mixtral"),
    "masked": masked_bert,
    "dropout": tiny_gpt2,
    "poisoned": lambda: poisoned(tiny_gpt2(dropout=0.0)),
    "scarce": Scarce,
    "factor": lambda: Scarce(factor=True),
    "batch norms": Normed,
    "other batch norms": lambda: Normed(momentum=None, affine=False, eps=0.1),
    "strided": strided_llama,
}


def dropped(model: TokenFormerForCausalLM) -> TokenFormerForCausalLM:
    """While it trains, some of what comes out of the embedding is zero."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, out: nn.functional.dropout(out, 0.1, module.training)
    )
    return model


def frozen(model: TokenFormerForCausalLM) -> TokenFormerForCausalLM:
    """What comes before the first tokens and some of the tokens stay as they are."""
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.key_tokens.requires_grad_(False)
    return model


class Drawing:
    """A hook that draws numbers where a hook may, and keeps them in a file of its process."""

    def __init__(self, file: Path) -> None:
        self.file, self.drawn = file, []

    def attach(self, model, optimizer) -> None: ...

    def before_step(self, step: int) -> None:
        self.drawn.append(float(torch.rand(())))

    def after_step(self, step: int) -> None:
        self.before_step(step)
        self.file.write_text(json.dumps(self.drawn))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


class Struck:
    """A hook that hits its own process before a step: by a signal, a full disk, or by letting it hang until the others
    have given up, with Python's lock or without, before the step or behind it."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def attach(self, model, optimizer) -> None: ...

    def before_step(self, step: int) -> None:
        if step != self.step:
            return
        if self.how == "asleep":
            time.sleep(self.long())
        elif self.how == "asleep with the lock":
            ctypes.PyDLL(None).sleep(int(self.long()))
        elif self.how == "disk full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        elif self.how != "asleep afterwards":
            signal.raise_signal(getattr(signal, self.how))

    def after_step(self, step: int) -> None:
        if step == self.step and self.how == "asleep afterwards":
            time.sleep(self.long())

    def long(self) -> float:
        return 2 * float(os.environ["AUXIN_STEP_SECONDS"])

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def do_train(ranks: Ranks, folder: Path, request: dict) -> None:
    model = MODELS[request["model"]]().to(getattr(torch, request.get("dtype", "float64")))
    # The losses of these are in their precision.
    if not isinstance(model, TokenFormerForCausalLM | BertForMaskedLM):
        model.loss_function = loss_in_the_models_precision
    if request.get("differs") == ranks.rank:
        model.get_input_embeddings().weight.data[0] += 1e-6
    hooks = []
    if "struck" in request:
        rank, step, how = request["struck"]
        hooks.append(Struck(step if rank == ranks.rank else -1, how))
    if "drawing" in request:
        hooks.append(Drawing(Path(f"{folder}.{ranks.rank}.drawn")))
    if request.get("blind") == ranks.rank:
        loop.read_state = unreadable
    if "slow" in request:
        rank, seconds = request["slow"]
        saving.write_pieces = partial(slow_pieces, seconds if rank == ranks.rank else 0)
    if "until" in request:
        rank, saved, step = request["until"]
        mark = Path(f"{folder}.begun")
        ranks.begin_step = partial(begin_and_mark, ranks.begin_step, step, mark)
        saving.write_pieces = partial(pieces_when_marked, saved if rank == ranks.rank else -1, mark)
    if "kill" in request:
        rank, step = request["kill"]
        ranks.begin_step = partial(begin_or_die, ranks.begin_step, step if rank == ranks.rank else -1)
    if "full" in request:
        rank, step = request["full"]
        saving.write_pieces = partial(pieces_on_a_full_disk, step if rank == ranks.rank else -1)
    settings = tiny_settings(**{"log_interval": 1, **request["settings"]})
    data = TinyData(poisoned_rows=tuple(request.get("poisoned", ())))
    train(model, data, settings, folder, hooks=hooks, progress=False, ranks=ranks, stop_after=request.get("stop_after"))
    if "digest" in request:
        kept = [tensor for tensor in model.state_dict().values() if not isinstance(tensor, DTensor)]
        digest = hashlib.sha256(b"".join(bits(tensor) for tensor in kept)).hexdigest()
        Path(f"{folder}.{ranks.rank}.digest").write_text(f"{len(kept)} {digest}")


def unreadable(checkpoint: Path) -> dict:
    raise CheckpointError(f"{checkpoint.name} can't be read")


def slow_pieces(seconds: float, folder: Path, rank: int, size: int, pieces: dict) -> Path:
    time.sleep(seconds)
    return write_pieces(folder, rank, size, pieces)


def begin_and_mark(begin: Callable[[int], None], marked: int, mark: Path, step: int) -> None:
    if step == marked:
        mark.touch()
    begin(step)


def pieces_when_marked(step: int, mark: Path, folder: Path, rank: int, size: int, pieces: dict) -> Path:
    """What is to be written of a checkpoint waits until another step has begun."""
    until = time.monotonic() + 60
    while f"step-{step:08d}" in folder.name and not mark.exists():
        assert time.monotonic() < until, "training waits for what is written"
        time.sleep(0.01)
    return write_pieces(folder, rank, size, pieces)


def begin_or_die(begin: Callable[[int], None], last: int, step: int) -> None:
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(step)


def pieces_on_a_full_disk(step: int, folder: Path, rank: int, size: int, pieces: dict) -> Path:
    if f"step-{step:08d}" in folder.name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    return write_pieces(folder, rank, size, pieces)


def do_tell(ranks: Ranks, folder: Path, request: dict) -> None:
    """The leader fails in what it does alone; all of them say so."""

    def make() -> None:
        raise ConfigError("the disk is full")

    ranks.told(make)


def do_meet(ranks: Ranks, folder: Path, request: dict) -> None:
    """One of them fails in what all do."""
    with ranks.together():
        if ranks.rank == request["failing"]:
            raise ConfigError("no such file here")


def do_vanish(ranks: Ranks, folder: Path, request: dict) -> None:
    """One of them, on a machine of its own, is there no more when the others ask for it."""
    if ranks.rank == 1:
        os._exit(0)
    with ranks.together():
        pass


class Traffic(TorchDispatchMode):
    """Counts what goes between the processes: calls, and bytes of what is whole afterwards or was before."""

    KINDS = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}
    """By the place of the whole tensor among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = dict.fromkeys(self.KINDS, 0), dict.fromkeys(self.KINDS, 0)
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function.name().partition("::")
        if space == "c10d" and name in self.KINDS:
            whole = args[self.KINDS[name]]
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in (whole if isinstance(whole, list) else [whole]))
        self.names.add(name)
        return function(*args, **(kwargs or {}))


def do_flow(ranks: Ranks, folder: Path, request: dict) -> None:
    """What a process holds after a step in pieces, and what goes between the processes in it; in bytes."""
    model = MODELS[request["model"]]()
    settings = tiny_settings(steps=1, batch_size=64, **request["settings"])
    objective = settings.objective.bind(model.config, TinyData().form)
    strategy = choose_strategy(settings, ranks, model.device, model, objective, ())
    strategy.place(model)
    optimizer = build_optimizer(model, settings)
    ids = torch.zeros(2, 16, dtype=torch.long)

    def learn(number: int) -> None:
        strategy.begin_pass(model, number == request["passes"] - 1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with Traffic() as traffic:
        for number in range(request["passes"]):
            learn(number)
    with Traffic() as stepped:
        optimizer.step()
    parameters = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = sum(tensor.to_local().nbytes for tensor in [*parameters, *(p.grad for p in parameters), *moments])
    for parameter in parameters:
        parameter.grad = None
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for number in range(request["passes"]):
            tracker.reset_mod_stats()  # of modules, which it knows one pass of
            learn(number)
        optimizer.step()
    found = {
        "held": held,
        "peak": tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"],
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "stepped": sorted(name for name in stepped.names if "adam" in name),
        "sent by the optimizer": sum(stepped.calls.values()),
    }
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps(found)))


def do_converted(ranks: Ranks, folder: Path, request: dict) -> None:
    """What a process holds more at the end of a forward pass in bfloat16 than before it; in bytes, without the layers
    being computed again and with."""
    found = []
    for again in (False, True):
        model = wide_llama()
        settings = tiny_settings(steps=1, batch_size=2, precision="bfloat16", **request["settings"])
        objective = settings.objective.bind(model.config, TinyData().form)
        strategy = choose_strategy(settings, ranks, model.device, model, objective, ())
        strategy.place(model)
        gradients = BatchGradients(model, objective, settings, strategy)
        ids = torch.zeros(2, 16, dtype=torch.long)
        strategy.begin_pass(model, True)
        tracker = MemTracker()
        tracker.track_external(model)
        with recomputed(model, again), tracker, gradients.autocast():
            held = [tracker.get_tracker_snapshot()[torch.device("cpu")]["Total"]]
            loss = objective.loss(model, {"input_ids": ids, "labels": ids})
            held.append(tracker.get_tracker_snapshot()[torch.device("cpu")]["Total"])
        loss.backward()
        found.append(held[1] - held[0])
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps(found)))


def do_reductions(ranks: Ranks, folder: Path, request: dict) -> None:
    """How many numbers each of the reductions adds up that a pass takes, forward and backward."""
    model = tiny_tokenformer(**request["changes"])
    strategy = Split(ranks, DividedLinear(model, ranks.size))
    strategy.place(model)
    ids = torch.zeros(2, 16, dtype=torch.long)
    found = []

    def reductions(run: Callable[[], Tensor]) -> Tensor:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            result = run()
        found.append(
            [math.prod(event.input_shapes[0]) for event in profiler.events() if event.name == "gloo:all_reduce"]
        )
        return result

    loss = reductions(lambda: model(input_ids=ids, labels=ids).loss)
    reductions(loss.backward)
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps(found)))


def do_gradients(ranks: Ranks, folder: Path, request: dict) -> None:
    """How far loss and gradients of divided models are from those of whole ones, in turn, relative to the largest."""
    found = {}
    ids = torch.arange(32).view(2, 16) * 7 % VOCABULARY
    for name in request["families"]:
        model = small(name).double()
        model.loss_function = loss_in_the_models_precision
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        losses, gradients = [], []
        for strategy in (None, Split(ranks, DividedLinear(model, ranks.size))):
            model.zero_grad(set_to_none=True)
            if strategy is not None:
                strategy.place(model)
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            parameters = list(model.parameters())
            if strategy is not None:
                strategy.add_up(parameters)
            gradients.append([whole(parameter.grad) for parameter in parameters])
        divided = sum(isinstance(parameter, DTensor) for parameter in parameters)
        apart = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*gradients, strict=True)]
        found[name] = [divided, float(losses[0] - losses[1]), max(apart)]
    ranks.told(lambda: Path(f"{folder}.json").write_text(json.dumps(found)))


def do_measure(ranks: Ranks, folder: Path, request: dict) -> None:
    """What each process finds of the first `batches` held-out batches of two, and how many passes it takes for each."""
    model = MODELS[request["model"]]().double()
    settings = tiny_settings(**{"steps": 1, **request["settings"]})
    data = TinyData(poisoned_rows=tuple(request.get("poisoned", ())))
    objective = settings.objective.bind(model.config, data.form)
    strategy = choose_any_strategy(settings, ranks, model.device, model, objective, ())
    strategy.place(model)
    passes = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(module.training))
    held_out = HeldOut((Loss(),), objective, data, 2, request["batches"], sharing=SharedAmong(strategy))
    loss = held_out.first(model)
    found = {"loss": loss.hex(), "passes": len(passes), "training": any(passes)}
    whole_split = HeldOut((Accuracy(), MacroF1()), objective, data, 3, sharing=SharedAmong(strategy)).all(model)
    found |= {kind: value.hex() for kind, value in whole_split.items()}
    Path(f"{folder}.{ranks.rank}.json").write_text(json.dumps(found))


SCENARIOS = {
    "train": do_train,
    "tell": do_tell,
    "meet": do_meet,
    "vanish": do_vanish,
    "flow": do_flow,
    "converted": do_converted,
    "reductions": do_reductions,
    "gradients": do_gradients,
    "measure": do_measure,
}


def child(rank: int, port: int, request: dict) -> int:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(request["size"]), "LOCAL_RANK": str(rank)}
    machine = request.get("machine", request["size"])  # how many are on it; of each process, if they see it otherwise
    os.environ |= {"LOCAL_WORLD_SIZE": str(machine[rank] if isinstance(machine, list) else machine)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"AUXIN_STEP_SECONDS": str(request.get("step_seconds", 600))}
    errors = Path(f"{request['folder']}.{rank}.err")
    os.dup2(os.open(f"{request['folder']}.{rank}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if request.get("machines"):
        platform.node = lambda: f"machine{rank}"
    try:
        with joined() as ranks:
            SCENARIOS[request["scenario"]](ranks, Path(request["folder"]), request)
    except AuxinError as error:
        errors.write_text(f"{type(error).__name__}: {error}")
        return error.exit_code
    except BaseException:
        errors.write_text(traceback.format_exc())
        return 98
    errors.write_text("")
    return 0


def serve(request: dict) -> dict:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    children = []
    for rank in range(request["size"]):
        pid = os.fork()
        if pid == 0:
            os._exit(child(rank, port, request))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    found = {"codes": codes}
    for name, ending in (("messages", "err"), ("said", "said")):
        files = [Path(f"{request['folder']}.{rank}.{ending}") for rank in range(request["size"])]
        found[name] = [path.read_text() if path.exists() else "" for path in files]
    return found


def answer() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    answer()
