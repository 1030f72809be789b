"""Two ways to compute the new streams of an AltUp layer, M X + g y: written out as sums of blocks, as the brick has it,
and as one product of matrices.

    python benchmarks/altup_arithmetic.py

Prints, eager and in float32, the time of the sums relative to that of the product (CPU time of one thread, the two
taking turns; medians and quartiles), for one token and for a forward and backward pass of 512, and how far each is from
the same in float64, relative to the largest entry; also the product with short operands. About half a minute of one
core. What was found stands beside the choice, in auxin/nn/altup_updates.py.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from measuring import made_by, made_by_line, quartiles
from torch import Tensor

from auxin.nn.altup_updates import AltUp, mixed_by_product, mixed_by_sums
from auxin.report.markdown import markdown_table

REPETITIONS = 40
Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WAYS: tuple[Update, Update] = (mixed_by_sums, mixed_by_product)


def short_product(mixing: Tensor, gains: Tensor, streams: Tensor, output: Tensor) -> Tensor:
    """The product with operands of bfloat16's digits, as autocast would have it, and TF32 with three bits more."""
    mixed = (mixing.bfloat16() @ streams.reshape(len(gains), -1).bfloat16()).to(streams.dtype)
    return torch.addr(mixed, gains, output.reshape(-1)).view(streams.shape)


def example(blocks: int, width: int, tokens: int) -> list[Tensor]:
    """Coefficients away from the identity, streams and what a layer made of one."""
    torch.manual_seed(0)
    layer = AltUp(blocks, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    streams, output = torch.randn(blocks, 1, tokens, width), torch.randn(1, tokens, width)
    return [tensor.detach() for tensor in (*layer.coefficients(torch.float32), streams, output)]


def timed(update: Update, case: list[Tensor], backward: bool) -> float:
    """Seconds of the processor for one pass."""
    case = [tensor.detach().requires_grad_(backward) for tensor in case]
    start = time.thread_time()
    with torch.set_grad_enabled(backward):
        new = update(*case)
        if backward:
            new.backward(torch.ones_like(new))
    return time.thread_time() - start


def ratio(blocks: int, width: int, tokens: int, backward: bool) -> str:
    """Time of the sums relative to the product."""
    case = example(blocks, width, tokens)
    times = [[timed(update, case, backward) for update in WAYS] for _ in range(REPETITIONS + 3)][3:]
    low, middle, high = quartiles([a / b for a, b in times])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def error(update: Update, case: list[Tensor]) -> str:
    """Largest deviation from the same in float64, relative to its largest entry."""
    exact = mixed_by_sums(*(tensor.double() for tensor in case))
    return f"{((update(*case) - exact).abs().max() / exact.abs().max()).item():.1e}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width, blocks in itertools.product((256, 768), (2, 4)):
        row = [str(width), str(blocks), ratio(blocks, width, 1, False), ratio(blocks, width, 512, True)]
        case = example(blocks, width, 64)
        rows.append(row + [error(update, case) for update in (*WAYS, short_product)])
    header = ["width", "K", "time, one token", "time, training", "error: sums", "product", "short product"]
    print(
        "\n".join([*markdown_table(header, rows), "", made_by_line(made_by("python benchmarks/altup_arithmetic.py"))])
    )


if __name__ == "__main__":
    main()
