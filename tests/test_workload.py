"""Workloads: the shipped data, the arrival processes, the lengths, fitting, and anyone's own trace."""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest

from slos_serve.loadtest import text, traces
from slos_serve.loadtest.trace_file import TraceError, read_trace
from slos_serve.loadtest.workload import (
    WORKLOADS,
    Arrival,
    Limits,
    fit,
    merged,
    onoff_bursts,
    poisson,
    replay,
    representative,
    tool_calling,
)

HEADER = "arrival_s,prompt_tokens,output_tokens"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("name", "column", "mean"),
    [
        ("azure_chat", "prompt_tokens", 1203),
        ("azure_chat", "output_tokens", 201),
        ("azure_code", "prompt_tokens", 2028),
        ("azure_code", "output_tokens", 27),
        ("sharegpt", "prompt_tokens", 2343),
        ("sharegpt", "output_tokens", 435),
        ("arxiv", "prompt_tokens", 2580),
        ("humaneval", "prompt_tokens", 117),
        ("toolbench_sessions", "tool_doc_tokens", 848),
        ("r1_afternoon", "reasoning_tokens", 911),
    ],
)
def test_shipped_lengths_have_the_published_means(name: str, column: str, mean: float) -> None:
    """Packing changed nothing: the means are those of the published data, to the token."""
    assert round(traces.load(name)[column].mean()) == mean


@pytest.mark.parametrize("name", ["azure_chat", "azure_code", "r1_morning", "r1_afternoon"])
def test_shipped_arrival_times_ascend(name: str) -> None:
    """Arrival times are in order and start near zero."""
    times = traces.arrival_times(name)
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < 1


def test_an_unknown_data_set_names_the_known_ones() -> None:
    """A misspelt data set is answered with the list."""
    with pytest.raises(KeyError, match="azure_chat"):
        traces.load("azure")


def test_packing_again_from_csv_gives_the_same_columns(tmp_path: Path) -> None:
    """`pack` reads what a CSV file says, in the smallest type that holds it."""
    with gzip.open(tmp_path / traces.TRACES["humaneval"].csv_name, "wt", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["task", "prompt_tokens", "output_tokens"], [0, 118, 50], [1, 300, 9]])
    columns = traces.pack(traces.TRACES["humaneval"], tmp_path)
    assert {name: values.tolist() for name, values in columns.items()} == {
        "prompt_tokens": [118, 300],
        "output_tokens": [50, 9],
    }
    assert columns["prompt_tokens"].dtype == np.uint16


def test_pack_traces_takes_a_folder() -> None:
    """The command's arguments are a folder to read and one to write."""
    parser = argparse.ArgumentParser()
    traces.add_arguments(parser)
    args = parser.parse_args(["--from", "in", "--to", "out"])
    assert (args.folder, args.to) == (Path("in"), Path("out"))


def test_poisson_has_its_rate_and_no_memory() -> None:
    """The mean rate is as asked and the gaps vary as much as they are long."""
    times = poisson(rng(), 10.0, 1000.0)
    gaps = np.diff(times)
    assert len(times) / 1000.0 == pytest.approx(10.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)


def test_bursts_are_five_times_the_mean_for_their_duty() -> None:
    """In bursts of 15 % of a period the rate is five times the mean, and the mean is kept."""
    times = onoff_bursts(rng(), 20.0, 4000.0, period=40.0)
    assert len(times) / 4000.0 == pytest.approx(20.0, rel=0.05)
    counts = np.sort(np.histogram(times, bins=4000, range=(0, 4000))[0])
    busiest = counts[-int(0.15 * 4000 * 0.8) :]  # well inside the bursts
    assert busiest.mean() == pytest.approx(100.0, rel=0.1)


def test_bursts_that_exceed_the_mean_are_refused() -> None:
    """A factor and duty that would leave less than nothing for the quiet time are an error."""
    with pytest.raises(ValueError, match="factor"):
        onoff_bursts(rng(), 1.0, 10.0, factor=10.0, duty=0.15)


@pytest.mark.parametrize("rate", [0.5, 3.0, 5.92, 20.0])
def test_replay_keeps_the_rate_asked_for(rate: float) -> None:
    """Thinned or superposed, a window as long as the trace has the rate asked for."""
    trace = traces.arrival_times("azure_chat")
    times = replay(rng(), trace, rate, 2334.0)
    assert len(times) / 2334.0 == pytest.approx(rate, rel=0.06)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 2334.0


@pytest.mark.parametrize("rate_factor", [0.5, 1.0, 3.0])
def test_replay_keeps_the_length_of_bursts(rate_factor: float) -> None:
    """A made-up trace of 10 s bursts every 100 s still has 10 s bursts at half and at three times the rate."""
    trace = np.sort(np.concatenate([start + rng(1).uniform(0, 10, 200) for start in range(0, 2000, 100)]))
    times = replay(rng(), trace, rate_factor * 2.0, 2000.0)
    bursts = np.split(times, np.flatnonzero(np.diff(times) > 3.0) + 1)
    assert np.median([burst[-1] - burst[0] for burst in bursts]) == pytest.approx(10.0, abs=1.0)


def test_replay_goes_round_a_trace_shorter_than_the_time() -> None:
    """A short trace repeats, at the same rate to the end."""
    times = replay(rng(), np.arange(100.0), 1.0, 1000.0)
    assert len(times) == pytest.approx(1000, abs=2)


def test_representative_takes_the_draw_nearest_to_the_count() -> None:
    """A short window of a bursty trace is drawn again until its number of arrivals is near the mean."""
    trace = traces.arrival_times("azure_code")
    times = representative(rng(), lambda generator: replay(generator, trace, 2.0, 60.0), 120.0)
    assert len(times) == pytest.approx(120, rel=0.15)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_workloads_repeat_from_a_seed(name: str) -> None:
    """The same seed gives the same arrivals; another one gives others."""

    def draw(seed: int) -> list[Arrival]:
        generator = rng(seed)
        return WORKLOADS[name](generator, poisson(generator, 5.0, 60.0))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("chatbot", 2343, 435),
        ("coding", 2028, 27),
        ("short_coding", 117, 47),
        ("summarization", 2580, 295),
        ("reasoning", 1430, 2172),
    ],
)
def test_sampled_lengths_have_the_means_of_the_data(name: str, prompt: float, output: float) -> None:
    """Twenty thousand samples have the data's mean lengths."""
    arrivals = WORKLOADS[name](rng(), np.arange(20_000.0))
    assert np.mean([arrival.prompt_tokens for arrival in arrivals]) == pytest.approx(prompt, rel=0.06)
    assert np.mean([arrival.output_tokens for arrival in arrivals]) == pytest.approx(output, rel=0.06)


def test_mixed_is_a_third_of_each() -> None:
    """The mix holds chatbot, coding and summarization equally, in order of time."""
    arrivals = WORKLOADS["mixed"](rng(), np.arange(9000.0))
    classes, counts = np.unique([arrival.slo_class for arrival in arrivals], return_counts=True)
    assert classes.tolist() == ["chatbot", "coding", "summarization"]
    assert counts == pytest.approx([3000, 3000, 3000], rel=0.06)
    assert [arrival.at for arrival in arrivals] == sorted(arrival.at for arrival in arrivals)


def test_reasoning_thinks_before_it_answers() -> None:
    """The output holds the thinking, which is most of it on average."""
    arrivals = WORKLOADS["reasoning"](rng(), np.arange(5000.0))
    assert all(0 < arrival.thinking_tokens <= arrival.output_tokens for arrival in arrivals)
    thinking = sum(arrival.thinking_tokens for arrival in arrivals)
    assert thinking / sum(arrival.output_tokens for arrival in arrivals) == pytest.approx(0.81, abs=0.03)


def test_tool_rounds_repeat_what_their_session_has_seen() -> None:
    """Each round's prompt is the last prompt, the last output and something new."""
    sessions: dict[str, list[Arrival]] = {}
    for arrival in tool_calling(rng(), np.arange(300.0)):
        assert arrival.session is not None
        sessions.setdefault(arrival.session, []).append(arrival)
    assert np.mean([len(rounds) for rounds in sessions.values()]) == pytest.approx(4.4, abs=0.2)
    for rounds in sessions.values():
        assert [arrival.round for arrival in rounds] == list(range(len(rounds)))
        assert rounds[0].tool_delay == rounds[0].reusable_prefix_tokens == 0
        for before, after in itertools.pairwise(rounds):
            assert after.reusable_prefix_tokens == before.prompt_tokens + before.output_tokens
            assert after.prompt_tokens > after.reusable_prefix_tokens
            assert after.tool_delay > 0


def test_fit_scales_lengths_and_clips_their_tail() -> None:
    """Lengths shrink by their scale, none exceeds the limit, and thinking keeps its share."""
    arrivals = WORKLOADS["reasoning"](rng(), np.arange(2000.0))
    small = fit(arrivals, Limits(0.1, 0.1, max_prompt_tokens=500, max_output_tokens=300))
    assert len(small) == len(arrivals)
    assert max(arrival.prompt_tokens for arrival in small) == 500
    assert max(arrival.output_tokens for arrival in small) == 300
    for before, after in zip(arrivals, small, strict=True):
        share = before.thinking_tokens / before.output_tokens
        assert after.thinking_tokens == pytest.approx(share * after.output_tokens, abs=1)
        if after.prompt_tokens < 500:
            assert after.prompt_tokens == max(1, round(before.prompt_tokens * 0.1))


def test_fit_ends_a_session_that_outgrows_the_context() -> None:
    """Rounds that would not fit are dropped with all that follow; the first one is kept."""
    arrivals = tool_calling(rng(), np.arange(200.0))
    small = fit(arrivals, Limits(max_prompt_tokens=1500))
    assert len({arrival.session for arrival in small}) == 200
    assert all(arrival.prompt_tokens <= 1500 for arrival in small)
    assert all(0 <= arrival.reusable_prefix_tokens < arrival.prompt_tokens for arrival in small)
    last: dict[str | None, int] = {}
    for arrival in small:
        assert arrival.round == last.get(arrival.session, -1) + 1
        last[arrival.session] = arrival.round


def test_merged_keeps_time_order_and_rounds() -> None:
    """Several workloads become one by time, a session's rounds in order."""
    tools = tool_calling(rng(), np.array([1.0, 3.0]))
    together = merged([tools, [Arrival(2.0, "chatbot", 1, 1)]])
    assert [arrival.at for arrival in together] == sorted(arrival.at for arrival in together)
    assert [arrival for arrival in together if arrival.session] == tools


def _density(mark: str, style: text.Style) -> float:
    return text.corpus(style).count(mark) / len(text.corpus(style))


def test_prompt_text_is_real_and_repeatable() -> None:
    """The same generator gives the same text, of about the length asked for, in the style of its class."""
    assert text.prompt(rng(), 100, "code") == text.prompt(rng(), 100, "code")
    assert text.prompt(rng(), 100, "code") != text.prompt(rng(1), 100, "code")
    assert len(text.prompt(rng(), 100, "prose", chars_per_token=4.0)) == 400
    assert _density("\n    def ", "prose") < 0.1 * _density("\n    def ", "code")
    assert (text.style_of("coding"), text.style_of("chatbot")) == ("code", "prose")


def test_prompt_text_can_be_longer_than_the_corpus() -> None:
    """A prompt longer than all the text goes round."""
    length = len(text.corpus("prose")) + 1000
    assert len(text.prompt(rng(), length, "prose", chars_per_token=1.0)) == length


def _write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_trace_with_every_column_becomes_arrivals(tmp_path: Path) -> None:
    """Every column lands in its field; unknown columns are ignored; later rounds may share a time."""
    path = _write(
        tmp_path / "t.csv",
        HEADER + ",slo_class,reasoning_tokens,session_id,round,tool_delay_s,reusable_prefix_tokens,client\n"
        "0.5,10,5,reasoning,3,,,,,x\n"
        "1.0,20,6,,,s1,0,,,x\n"
        "1.0,30,7,tool_calling,,s1,1,0.25,26,x\n",
    )
    assert read_trace(path, default_class="coding") == [
        Arrival(0.5, "reasoning", 10, 5, thinking_tokens=3),
        Arrival(1.0, "coding", 20, 6, session="s1"),
        Arrival(1.0, "tool_calling", 30, 7, session="s1", round=1, tool_delay=0.25, reusable_prefix_tokens=26),
    ]


def test_a_gzipped_trace_is_read_whatever_its_name(tmp_path: Path) -> None:
    """Compression is seen from the content."""
    path = tmp_path / "trace.csv"
    path.write_bytes(gzip.compress(f"{HEADER}\n0,10,5\n".encode()))
    assert read_trace(path) == [Arrival(0.0, "chatbot", 10, 5)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "the file is empty"),
        (HEADER + "\n", "has no rows"),
        ("arrival_s,prompt_tokens\n0,1\n", "line 1: no column output_tokens"),
        (HEADER + "\n0,-3,5\n", "line 2: prompt_tokens: must be a whole number of at least 1, got '-3'"),
        (HEADER + "\n0,10,0\n", "line 2: output_tokens: must be a whole number of at least 1, got '0'"),
        (HEADER + "\n0,10,5\n1,ten,5\n", "line 3: prompt_tokens: must be a number, got 'ten'"),
        (HEADER + "\n0,10,2.5\n", "line 2: output_tokens: must be a whole number"),
        (HEADER + "\n0,10,\n", "line 2: output_tokens: must be a number, got ''"),
        (HEADER + "\n0,10\n", "line 2: output_tokens: is missing"),
        (HEADER + "\n-1,10,5\n", "line 2: arrival_s: must be a number of seconds, 0 or more, got '-1'"),
        (HEADER + "\nnan,10,5\n", "line 2: arrival_s: must be a number of seconds"),
        (HEADER + "\n2,10,5\n1,10,5\n", "line 3: arrival_s: must not decrease, got 1.0 after 2.0"),
        (HEADER + "\n1,10,5\n1,10,5\n", "line 3: arrival_s: duplicate time 1.0"),
        (HEADER + ",reasoning_tokens\n1,10,5,6\n", "line 2: reasoning_tokens: must be at most 5"),
        (HEADER + ",reusable_prefix_tokens\n1,10,5,11\n", "line 2: reusable_prefix_tokens: must be at most 10"),
        (HEADER + ",tool_delay_s\n1,10,5,inf\n", "line 2: tool_delay_s: must be a number of seconds"),
        (HEADER + ",session_id,round\n1,10,5,s,1\n", "line 2: round: must be 0 of session 's', got 1"),
        (HEADER + ",round\n1,10,5,1\n", "line 2: round: must be 0 without session_id, got 1"),
    ],
)
def test_a_bad_trace_is_refused_by_file_line_and_field(tmp_path: Path, content: str, complaint: str) -> None:
    """The message says where the trace is wrong and what was found there."""
    path = _write(tmp_path / "bad.csv", content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("content", [b"\x1f\x8bnot gzip", b"arrival_s,prompt_tokens,output_tokens\n\xff\xfe,1,1\n"])
def test_a_file_that_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    """Broken compression and broken text end in the same kind of message."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="not a CSV file"):
        read_trace(path)


def test_equal_times_can_be_allowed(tmp_path: Path) -> None:
    """A trace whose clock ticks in whole seconds is read when the caller says so."""
    path = _write(tmp_path / "ties.csv", HEADER + "\n1,10,5\n1,11,5\n")
    assert [arrival.prompt_tokens for arrival in read_trace(path, allow_ties=True)] == [10, 11]
