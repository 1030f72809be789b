"""How long a training waits for a stream: Parquet files of the standard library's source, a Llama, one thread.

Each cell is a training of its own, into a folder of its own, with nothing tokenized before: with the process that
tokenizes ahead, without it, and on the same text prepared as a whole. The clock of the share is the training's
(`data_share` in metrics.jsonl); what comes before the first step is told apart.

    python benchmarks/streaming.py
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import torch
from measuring import made_by, made_by_line, publish
from transformers import LlamaConfig, LlamaForCausalLM

from auxin.data import CorpusSettings, prepare
from auxin.data.shards_ahead import ShardsAhead
from auxin.data.sources import read_documents
from auxin.data.stream_order import place_of
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.streamed_text import StreamedText
from auxin.data.streamed_text import prepare as prepare_stream
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, train
from auxin.training.metrics import metrics_in

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "streaming.json"
PAGE = ROOT / "docs" / "results" / "streaming.md"
FILES, ROWS = 16, 4
"""Parquet files, and rows of a row group."""
SHARD, WINDOW = 2**16, 4
"""Bytes of a shard, and shards that are shuffled together."""
LENGTH, BATCH, VOCABULARY, STEPS, QUICK = 256, 8, 2048, 120, 8
LAYERS, WIDTH = 2, 64
"""Of the Llama: the smaller it is, the less time there is for the data."""
AHEAD, ALONE, WHOLE = "a stream, tokenized ahead", "a stream, nothing ahead", "prepared as a whole"
COLUMNS = ("data", "s before the first step", "windows", "tokens per s", "share of waiting", "largest share")


def write_corpus(folder: Path) -> int:
    """The standard library's documents in Parquet files; their bytes."""
    texts = [document.data.decode() for document in read_documents(CorpusSettings()) if document.data is not None]
    folder.mkdir()
    for number in range(FILES):
        table = pyarrow.table({"text": texts[number::FILES]})
        pyarrow.parquet.write_table(table, folder / f"{number:02}.parquet", row_group_size=ROWS)
    return sum(len(text.encode()) for text in texts)


@contextlib.contextmanager
def nothing_ahead() -> Iterator[None]:
    """Within the context nobody tokenizes ahead."""
    with patch.object(ShardsAhead, "ask", lambda self, shards: None):
        yield


def cell(kind: str, corpus: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One training, from nothing."""
    common = {"paths": str(corpus), "vocab_size": VOCABULARY, "context_length": LENGTH, "validation_fraction": 0.02}
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 4 * WIDTH}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=LENGTH, **sizes)
    settings = TrainingSettings(
        steps=steps, batch_size=BATCH, log_interval=max(1, steps // 20), evaluation_batches=1, tensorboard=False,
        checkpoint_interval=None, num_workers=0,
    )  # fmt: skip
    started = time.perf_counter()
    if kind == WHOLE:
        data: Any = prepare(CorpusSettings.parse(common), folder / "data")
    else:
        own = {"sample_bytes": 2_000_000, "shard_bytes": SHARD, "shuffle_shards": WINDOW}
        data = prepare_stream(StreamedTextSettings.parse({**common, **own}), folder / "data")
    prepared = time.perf_counter() - started
    train(LlamaForCausalLM(config), data, settings, folder / "run", progress=False)
    lines = metrics_in(folder / "run")
    rates = [line for line in lines if "data_share" in line]
    seconds = [BATCH * LENGTH * settings.log_interval / line["units_per_second"] for line in rates]
    waited = sum(line["data_share"] * took for line, took in zip(rates, seconds, strict=True))
    return {
        "data": kind,
        "before": prepared + lines[0]["seconds"],
        "rate": steps * BATCH * LENGTH / sum(seconds),
        "share": waited / sum(seconds),
        "largest": max(line["data_share"] for line in rates),
        "windows": None if kind == WHOLE else windows(data, steps * BATCH),
    }


def windows(data: StreamedText, contexts: int) -> int:
    """How many windows so many contexts were drawn from, at most an epoch: those of the shards that they are of."""
    order = data.split("train").order(contexts, TrainingSettings(steps=1).seed)
    return -(-len({place_of(number)[0] for number in order.batch(0)}) // WINDOW)


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        [
            *(row["data"], f"{row['before']:.1f}", "-" if row["windows"] is None else str(row["windows"])),
            *(f"{row['rate']:,.0f}", f"{row['share']:.2%}", f"{row['largest']:.2%}"),
        ]
        for row in results["cells"]
    ]
    share = next(row["share"] for row in results["cells"] if row["data"] == AHEAD)
    return "\n".join([
        "# How long a training waits for a stream",
        "",
        f"{results['bytes']:,} bytes of the standard library's source in {FILES} Parquet files, shards of {SHARD:,} "
        f"bytes at least, {WINDOW} of them shuffled together (a window); a Llama of {LAYERS} layers of width {WIDTH}, "
        f"{STEPS} batches of {BATCH} contexts of {LENGTH} tokens, no reading process, one thread for the training. "
        "Each training begins with nothing prepared. Before the first step come the sample, a new tokenizer, the first "
        "window (or the whole corpus), the first evaluation and checkpoint. The largest share is that of a twentieth "
        "of the steps. Others used the machine: its load average was "
        f"{results['load'][0]:.1f} at the start and {results['load'][1]:.1f} at the end, so that all took longer than "
        "alone.",
        "",
        f"With the process that tokenizes ahead, {share:.2%} of the time of the steps is waiting for data.",
        "",
        made_by_line(results),
        "",
        *markdown_table(COLUMNS, rows),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    cells = []
    with tempfile.TemporaryDirectory() as work:
        size = write_corpus(Path(work) / "corpus")
        for kind in (AHEAD, ALONE, WHOLE):
            folder = Path(work) / f"{len(cells)}"
            with nothing_ahead() if kind == ALONE else contextlib.nullcontext():
                cells.append(cell(kind, Path(work) / "corpus", folder, QUICK if quick else STEPS))
            print(cells[-1], file=sys.stderr)
    results = {
        **made_by("python benchmarks/streaming.py"),
        "bytes": size,
        "load": [load, os.getloadavg()[0]],
        "cells": cells,
    }
    publish(results, RESULTS, page_of(results), PAGE, quick)


if __name__ == "__main__":
    main()
