"""The lengths and arrival times that ship with the package, one small numpy archive per data set.

Promises integers as published (arrival times rounded to milliseconds, lengths in tokens), in arrival
order, never any prompt text. Sources, licences and statistics are in `data/README.md`, which
`slos-serve pack-traces --from DIR` writes together with the archives from a folder of CSV files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Column: TypeAlias = NDArray[np.int64]
Columns: TypeAlias = Mapping[str, Column]
Rows: TypeAlias = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Trace:
    """One data set: which CSV file it is packed from, how, and where that came from.

    `columns` maps a column's name to how it is read from the rows; `first_s` keeps rows that arrive
    before so many seconds.
    """

    name: str
    csv_name: str
    origin: str
    licence: str
    note: str
    columns: Mapping[str, Callable[[Rows], Sequence[int]]]
    first_s: float = math.inf


def _integers(name: str) -> Callable[[Rows], Sequence[int]]:
    return lambda rows: [int(row[name]) for row in rows]


def _milliseconds(rows: Rows) -> Sequence[int]:
    return [round(float(row["arrival_s"]) * 1000) for row in rows]


def _session_numbers(rows: Rows) -> Sequence[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row["session_id"], len(numbers)) for row in rows]


_LENGTHS: Final = {"prompt_tokens": _integers("prompt_tokens"), "output_tokens": _integers("output_tokens")}
_ARRIVALS: Final = {"arrival_ms": _milliseconds}
_REASONING: Final = {
    **_ARRIVALS,
    **{name: _integers(name) for name in ("prompt_tokens", "reasoning_tokens", "answer_tokens")},
}
_AZURE: Final = "Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_{}.csv (Splitwise, ISCA 2024)"
_SERVEGEN: Final = "alibaba/ServeGen, data/reason/deepseek-r1"
_TOOLBENCH: Final = "OpenBMB/ToolBench, "
_RESAMPLED: Final = (
    "drawn from the published rates and length distributions of each client, not logged; fields independent; {}"
)

TRACES: Final[Mapping[str, Trace]] = {
    trace.name: trace
    for trace in (
        Trace(
            "azure_chat",
            "azure2023_conv_first2of3.csv.gz",
            _AZURE.format("conv"),
            "CC-BY-4.0",
            "production chat, 16 November 2023, first two thirds",
            _ARRIVALS | _LENGTHS,
        ),
        Trace(
            "azure_code",
            "azure2023_code_first2of3.csv.gz",
            _AZURE.format("code"),
            "CC-BY-4.0",
            "production code completion, the same day, first two thirds; bursts, and gaps of up to 174 s",
            _ARRIVALS | _LENGTHS,
        ),
        Trace(
            "sharegpt",
            "sharegpt_lengths_first2of3.csv.gz",
            "microsoft/sarathi-serve, data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
            "Apache-2.0",
            "Llama-2 tokens; prompts include the conversation so far; at most 8k",
            _LENGTHS,
        ),
        Trace(
            "arxiv",
            "arxiv_summarization_lengths_first2of3.csv.gz",
            "microsoft/vidur, data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
            "MIT",
            "Llama-2 tokens; at most 4096 in total",
            _LENGTHS,
        ),
        Trace(
            "humaneval",
            "humaneval_lengths_first2of3.csv.gz",
            "openai/human-eval, data/HumanEval.jsonl.gz",
            "MIT",
            "cl100k tokens; outputs are the human solutions, shorter than what a chat model writes",
            _LENGTHS,
        ),
        Trace(
            "toolbench_sessions",
            "toolbench_sessions_G1_G2.csv.gz",
            _TOOLBENCH + "toolbench/tooleval/results/default_evalset/gpt-3.5-turbo_CoT",
            "Apache-2.0",
            "cl100k tokens; a final answer of 0 tokens means that the model gave up",
            {name: _integers(name) for name in ("llm_calls", "tool_doc_tokens", "query_tokens", "final_answer_tokens")},
        ),
        Trace(
            "toolbench_turns",
            "toolbench_example_turns_G1_G2.csv.gz",
            _TOOLBENCH + "data_example/answer",
            "Apache-2.0",
            "one row per model call; new tokens are those after the previous prompt and output",
            {"session": _session_numbers}
            | {
                name: _integers(name)
                for name in ("turn", "prompt_tokens", "new_prompt_tokens", "output_tokens", "is_final")
            },
        ),
        Trace(
            "r1_morning",
            "servegen_deepseek_r1_10h_11h.csv.gz",
            _SERVEGEN,
            "Apache-2.0",
            _RESAMPLED.format("10:00 to 10:20"),
            _REASONING,
            first_s=1200.0,
        ),
        Trace(
            "r1_afternoon",
            "servegen_deepseek_r1_14h_14h40.csv.gz",
            _SERVEGEN,
            "Apache-2.0",
            _RESAMPLED.format("14:00 to 14:40"),
            _REASONING,
        ),
    )
}


@cache
def load(name: str) -> Columns:
    """The columns of a shipped data set, int64 arrays of equal length; read-only.

    Raises KeyError listing the known names.
    """
    if name not in TRACES:
        raise KeyError(f"unknown data set {name!r}; known: {', '.join(sorted(TRACES))}")
    with files(__package__).joinpath("data", f"{name}.npz").open("rb") as stream, np.load(stream) as archive:
        columns = {key: archive[key].astype(np.int64) for key in archive.files}
    for column in columns.values():
        column.flags.writeable = False
    return columns


def arrival_times(name: str) -> NDArray[np.float64]:
    """The arrival times of a shipped trace in seconds, ascending; equal times are kept."""
    return load(name)["arrival_ms"] / 1000.0


def pack(trace: Trace, folder: Path) -> dict[str, NDArray[Any]]:
    """Read a data set's CSV file into the smallest unsigned integers that hold it."""
    with gzip.open(folder / trace.csv_name, "rt", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if float(row.get("arrival_s") or 0) < trace.first_s]
    return {name: _smallest(read(rows)) for name, read in trace.columns.items()}


def _smallest(values: Sequence[int]) -> NDArray[Any]:
    return np.array(values, dtype=np.min_scalar_type(max(values)))


_README_HEAD: Final = """# Lengths and arrivals

Compact copies of public data: token counts and arrival times, no text. Written by `slos-serve pack-traces`;
`slos_serve.loadtest.traces.load(name)` reads them. Lengths are tokens, given as mean / P50 / P99. Each file is
numpy's compressed archive of unsigned integers, one array per column, `arrival_ms` from the start of the trace.

| file | what | source | licence | rows | statistics |
|---|---|---|---|---|---|
"""


def readme_row(trace: Trace, columns: Mapping[str, NDArray[Any]]) -> str:
    """One row of the data folder's README."""
    rows = len(next(iter(columns.values())))
    numbers = []
    for name, values in columns.items():
        if name == "arrival_ms":
            seconds = int(values[-1]) / 1000
            numbers.append(f"{seconds:.0f} s, {rows / seconds:.2f} requests/s")
        elif name.endswith("_tokens") or name == "llm_calls":
            p50, p99 = np.percentile(values, (50, 99))
            numbers.append(f"{name} {values.mean():.0f} / {p50:.0f} / {p99:.0f}")
    cells = (f"`{trace.name}.npz`", trace.note, trace.origin, trace.licence, str(rows), "; ".join(numbers))
    return "| " + " | ".join(cells) + " |\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve pack-traces`."""
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder with the CSV.gz files")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "data", help="folder to write to")


def run(args: argparse.Namespace) -> int:
    """Pack every data set and write the README beside them."""
    text = _README_HEAD
    for trace in TRACES.values():
        columns = pack(trace, args.folder)
        np.savez_compressed(args.to / f"{trace.name}.npz", **columns)
        text += readme_row(trace, columns)
    (args.to / "README.md").write_text(text)
    return 0
