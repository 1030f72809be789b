"""Trains in several forked processes together on request: see fork_server.py, of which this is the other half.

Reads one JSON request per line from standard input, and answers with the exit code and the message of each process.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from auxin.errors import AuxinError, CheckpointError, ConfigError
from auxin.training import loop, train
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import Ranks, joined
from auxin.training.strategies import choose_strategy
from training.tiny import VOCABULARY, TinyData, poisoned, tiny_gpt2, tiny_llama, tiny_settings, tiny_tokenformer


def masked_bert() -> BertForMaskedLM:
    """Micro-batches of its objective have unequal numbers of targets."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokens = {"vocab_size": VOCABULARY + 1, "max_position_embeddings": 16, "pad_token_id": 0}
    return BertForMaskedLM(BertConfig(**sizes, **dropout, **tokens))


def loss_in_the_models_precision(logits: Tensor, labels: Tensor, **unused: object) -> Tensor:
    """A language model's loss. transformers' own is in single precision, as are the norms and the rotation of a Llama,
    which is no model to compare in double precision for that: optimizers make much of rounding."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


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
    "masked": masked_bert,
    "dropout": tiny_gpt2,
    "poisoned": lambda: poisoned(tiny_gpt2(dropout=0.0)),
    "scarce": Scarce,
    "factor": lambda: Scarce(factor=True),
    "strided": strided_llama,
}


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


class Signalled:
    """A hook that hits its own process at a step; or, with SIGSTOP, lets it hang until the others have given up."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def attach(self, model, optimizer) -> None: ...

    def before_step(self, step: int) -> None:
        if step == self.step:
            if self.number == signal.SIGSTOP:
                time.sleep(3 * float(os.environ["AUXIN_STEP_SECONDS"]))
            else:
                signal.raise_signal(self.number)

    def after_step(self, step: int) -> None: ...

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def do_train(ranks: Ranks, folder: Path, request: dict) -> None:
    model = MODELS[request["model"]]().to(getattr(torch, request.get("dtype", "float64")))
    if request["model"] not in ("tokenformer", "masked"):  # whose own losses are in their precision
        model.loss_function = loss_in_the_models_precision
    if request.get("differs") == ranks.rank:
        model.get_input_embeddings().weight.data[0] += 1e-6
    hooks = []
    if "signal" in request:
        rank, step, name = request["signal"]
        hooks.append(Signalled(step if rank == ranks.rank else -1, getattr(signal, name)))
    if "drawing" in request:
        hooks.append(Drawing(Path(f"{folder}.{ranks.rank}.drawn")))
    if request.get("blind") == ranks.rank:
        loop.read_state = unreadable
    settings = tiny_settings(**{"log_interval": 1, **request["settings"]})
    data = TinyData(poisoned_rows=tuple(request.get("poisoned", ())))
    train(model, data, settings, folder, hooks=hooks, progress=False, ranks=ranks, stop_after=request.get("stop_after"))


def unreadable(checkpoint: Path) -> dict:
    raise CheckpointError(f"{checkpoint.name} can't be read")


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


SCENARIOS = {"train": do_train, "tell": do_tell, "meet": do_meet, "flow": do_flow}


def child(rank: int, port: int, request: dict) -> int:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(request["size"]), "LOCAL_RANK": str(rank)}
    machine = request.get("machine", request["size"])  # how many are on it; of each process, if they see it otherwise
    os.environ |= {"LOCAL_WORLD_SIZE": str(machine[rank] if isinstance(machine, list) else machine)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"AUXIN_STEP_SECONDS": str(request.get("step_seconds", 600))}
    errors = Path(f"{request['folder']}.{rank}.err")
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
    errors = [Path(f"{request['folder']}.{rank}.err") for rank in range(request["size"])]
    return {"codes": codes, "messages": [path.read_text() if path.exists() else "" for path in errors]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
