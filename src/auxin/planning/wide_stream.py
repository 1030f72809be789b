"""Plans for a residual stream of several blocks from end to end: tables, norms and heads that hold all of them.

What stands before the layers gets K blocks where it had one, and what reads the last stream reads K; which of them hold
the old stream, and who reads it, is the conversion.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from auxin.edits import ConstantFill, Edit, NormalFill, PadParameter, RepeatFill, ZeroFill
from auxin.edits.kinds.fills import CopyFill, Fill
from auxin.edits.kinds.module_edits import ReplaceModule
from auxin.edits.kinds.parameter_edits import ABSENT_UNIT, SliceParameter
from auxin.edits.tensor_names import tensor_names
from auxin.errors import PlanError
from auxin.models.anatomy import norm_epsilon
from auxin.planning.depth import depth
from auxin.words.anatomy import Anatomy, LayerStack

WideConversion = Literal["copies", "free", "relay", "zeros", "random"]
"""Where the other blocks come from and who reads them: copies of the table, read in equal parts; a random table, read
by nobody ("free": block 0 is the old stream; "relay": the block that comes next behind the last layer is); zeros, read
by random weights; random both."""


class WideStream:
    """The edits of what comes before and after the layers of one model.

    Args:
        model: also on the meta device.
        body: its anatomy.
        blocks: K.
        conversion: where the other blocks come from and who reads them.
        norm: statistics of the last norm: of each block, or of all entries.
        noise: of the readers, with "copies"; relative to them, summing to zero over the blocks.

    Raises:
        PlanError: a head that is the embedding would read what it must not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        body: Anatomy,
        blocks: int,
        conversion: WideConversion,
        norm: Literal["blocks", "all"] = "blocks",
        noise: float = 0.0,
    ) -> None:
        self.model, self.body, self.blocks = model, body, blocks
        self.conversion, self.norm, self.noise = conversion, norm, noise
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tables = self._tables()
        self.tied = [path for path in self._readers() if self._weight(path) in self.tables.values()]
        if self.tied and conversion not in ("copies", "random"):
            raise PlanError(
                f"conversion = {conversion}: {self.tied[0]} is the embedding (tied), whose other blocks it "
                "would read too. Ask for copies, or untie the two first."
            )

    def edits(self) -> list[Edit]:
        """All of them, from the input to the output."""
        result = self.tables_alone()
        for stack in self.body.stacks:
            result += self._end(stack)
        for path in self._readers():
            result.append(ReplaceModule(module=path, brick="wide_linear", settings={"blocks": self.blocks}))
            if path not in self.tied:
                result.append(self._read(path))
        return result

    def summed(self) -> list[Edit]:
        """Those of the embeddings, and of a head that is one of them: it reads the sum of its blocks."""
        if len(set(self.tables.values())) > 1:
            raise PlanError(
                f"control = sum: {' and '.join(self.tables)} are added up before the first layer already. Choose an "
                "architecture with one table."
            )
        result, blocks = self.tables_alone(), {"blocks": self.blocks}
        for stack in self.body.stacks:
            if self._reads_by_table(stack):
                result.append(ReplaceModule(module=stack.end, brick="repeated_output", settings=blocks))
        return [*result, *(ReplaceModule(module=path, brick="wide_linear", settings=blocks) for path in self.tied)]

    def _reads_by_table(self, stack: LayerStack) -> bool:
        """Whether what leaves the stack is read by the embedding."""
        return any(stack.is_read_by(path) for path in self.tied)

    def tables_alone(self) -> list[Edit]:
        """Those of the embeddings."""
        result: list[Edit] = []
        blocks = self.blocks
        entries = dict.fromkeys(path for stack in self.body.stacks for path in stack.entries)
        for path in entries:
            if path not in self.modules:
                continue
            if isinstance(self.modules[path], nn.Embedding):
                result.append(ReplaceModule(module=path, brick="wide_embedding", settings={"blocks": blocks}))
            else:
                result.append(self._parallel(path))
        return [*result, *(self._padded(name) for name in dict.fromkeys(self.tables.values()))]

    def _tables(self) -> dict[str, str]:
        """The embedding tables that enter the layers, by their modules: the first name of each one's parameter."""
        entries = {path for stack in self.body.stacks for path in stack.entries}
        found = {path: self.modules[path] for path in entries if isinstance(self.modules.get(path), nn.Embedding)}
        return {path: self._weight(path) for path in sorted(found)}

    def _weight(self, path: str) -> str:
        """The first name of the weight of the module at `path`."""
        wanted = self.model.get_submodule(path).weight
        return next(name for name, parameter in self.model.named_parameters() if parameter is wanted)

    def _readers(self) -> list[str]:
        found = [path for path in self.modules if any(stack.is_read_by(path) for stack in self.body.stacks)]
        if odd := next((path for path in found if type(self.modules[path]) is not nn.Linear), None):
            raise PlanError(
                f"{odd}, which reads the last stream, is a {type(self.modules[odd]).__name__} and no plain nn.Linear. "
                "Ask for the conversion recycled, which leaves it alone."
            )
        return found

    def _padded(self, name: str) -> Edit:
        width = self.blocks * self.body.sizes.residual
        fills: dict[str, Fill] = {"copies": RepeatFill(), "zeros": ZeroFill()}
        fill = fills.get(self.conversion, NormalFill())
        return PadParameter(parameter=name, axis=1, size=width, fill=fill)

    def _parallel(self, path: str) -> Edit:
        """Embeddings that are no table, K times side by side."""
        module, fills = self.modules[path], dict[str, Fill]()
        parameters = dict(module.named_parameters())
        std = float(getattr(self.model.config, "initializer_range", 0.02))
        for other in range(self.blocks - 1):
            for name in tensor_names(module):
                fill: Fill = CopyFill(of=name)
                fresh = self.conversion != "copies" and name in parameters
                if fresh and parameters[name].dim() > 1:
                    fill = ZeroFill() if self.conversion == "zeros" else NormalFill(std=std)
                elif fresh:
                    is_gain = name.endswith("LayerNorm.weight")
                    fill = ConstantFill(value=1.0) if is_gain else ZeroFill()
                fills[f"others.{other}.{name}"] = fill
        return ReplaceModule(module=path, brick="parallel_embeddings", settings={"blocks": self.blocks}, fills=fills)

    def _end(self, stack: LayerStack) -> Iterator[Edit]:
        """The norm for all blocks, or what puts them side by side where there is none."""
        if not stack.ends_in_norm:
            yield ReplaceModule(module=stack.end, brick="collapsed_output", settings={"collapse": "concatenate"})
            return
        norm, blocks = self.modules[stack.end], self.blocks
        if isinstance(norm, nn.Identity):
            raise PlanError(
                f"conversion = {self.conversion}: no norm follows the layers of {stack.path} directly that "
                "would take their blocks one by one. Ask for the conversion recycled, which makes one of them before."
            )
        eps = norm_epsilon(norm)
        scale = 1 / blocks if self._reads_by_table(stack) else 1.0
        if self.norm == "all" and self.conversion == "zeros":
            if self.body.norm == "layer":
                raise PlanError(
                    "norm = all: a LayerNorm over blocks of zeros would see another mean. Leave norm out: each block "
                    "then has a norm of its own."
                )
            # Blocks of zeros make the mean square K times smaller.
            scale, eps = blocks**-0.5, eps / blocks
        values: dict[str, Any] = {"hidden_size": self.body.sizes.residual, "blocks": blocks, "kind": self.body.norm}
        values |= {"over": self.norm, "eps": eps}
        values |= {"gain_offset": self.body.gain_offset} if self.body.gain_offset else {}
        values |= {"scale": scale} if scale != 1 else {}
        yield ReplaceModule(module=stack.end, brick="block_norm", settings=values)
        width = blocks * self.body.sizes.residual
        for name, _ in norm.named_parameters(recurse=False):
            # Zeros through a LayerNorm are its offset, which must be zero for them.
            zeros = name == "bias" and self.conversion == "zeros"
            fill: Fill = ZeroFill() if zeros else RepeatFill()
            yield PadParameter(parameter=f"{stack.end}.{name}", axis=0, size=width, fill=fill)

    def _read(self, path: str) -> Edit:
        """The weight of a layer that reads the last stream."""
        name, blocks, width = f"{path}.weight", self.blocks, self.body.sizes.residual
        states = self.modules[path].in_features // width  # side by side, each of them now of several blocks
        if self.conversion == "copies":
            index = [state for state in range(states) for _ in range(blocks)]
            return SliceParameter(parameter=name, axis=1, index=index, unit=width, divide=True, noise=self.noise)
        if self.conversion in ("zeros", "random") and states == 1:
            return PadParameter(parameter=name, axis=1, size=blocks * width, fill=NormalFill())
        if self.conversion in ("zeros", "random"):
            raise PlanError(
                f"conversion = {self.conversion}: {path} reads {states} hidden states side by side, between "
                "whose blocks random columns can't be put. Ask for copies, free or recycled."
            )
        last = self._last_block(path)
        index = [state if block == last else ABSENT_UNIT for state in range(states) for block in range(blocks)]
        return SliceParameter(parameter=name, axis=1, index=index, unit=width)

    def _last_block(self, path: str) -> int:
        """The block that holds the old stream behind the last layer, of the stack that `path` reads."""
        if self.conversion != "relay":
            return 0
        read = next(stack for stack in self.body.stacks if stack.is_read_by(path))
        return depth(self.model, read) % self.blocks
