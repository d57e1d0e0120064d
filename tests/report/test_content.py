"""What a report embeds equals what the analyses give, and hostile texts stay texts."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_route import analysis, report
from moe_route.analysis import AnalysisError
from moe_route.base import files
from moe_route.data.batches import Text
from moe_route.recording import RoutingStatistics, Trace
from moe_route.report import Figure, Inputs
from moe_route.report.page import safe_json
from moe_route.report.token_view import chosen_sequences, pieces_by_id, pieces_of
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

from .conftest import HOSTILE, TEXTS


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    name, dtype = ("u16", "<u2") if "u16" in packed else ("u8", "u1")
    return np.frombuffer(base64.b64decode(packed[name]), dtype)


@pytest.fixture(scope="session")
def content(page_file: Path) -> dict[str, Any]:
    """The data of the page, as a browser reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page_file.read_text("utf-8"), re.S)
    assert found is not None
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def test_frequencies_are_those_of_the_statistics(content: dict[str, Any], inputs: Inputs) -> None:
    for name, statistics in inputs.recordings.items():
        packed = content["recordings"][name]["frequency"]["values"]
        want = statistics.frequency()
        got = unpacked(packed).reshape(want.shape) * packed["scale"]
        assert np.abs(got - want).max() <= packed["scale"] / 2 + 1e-12
        assert packed["scale"] < 1e-4


def test_divergence_correlation_and_load_are_those_of_the_analyses(content: dict[str, Any], inputs: Inputs) -> None:
    statistics, shown = inputs.recordings["natural"], content["recordings"]["natural"]
    found = analysis.divergence(statistics, "eng_Latn")
    low, high = found.interval(0.95)
    for name, want in (("values", found.values), ("floor", found.expected_floor), ("low", low), ("high", high)):
        np.testing.assert_allclose(shown["divergence"][name], want, rtol=1e-4, atol=1e-9)
    correlated = analysis.correlation(found, inputs.scores["accuracy"])
    np.testing.assert_allclose(shown["correlations"][0]["pearson"], correlated.pearson, rtol=1e-4)
    load = analysis.load_balance(statistics)
    effective = shown["balance"]["measures"]["Effective number of experts"]["values"]
    np.testing.assert_allclose(effective, load.effective, rtol=1e-4)


def test_what_was_counted_is_told(content: dict[str, Any], inputs: Inputs) -> None:
    facts = content["recordings"]["natural"]["facts"]
    assert {g["name"]: g["tokens"] for g in facts["groups"]} == dict(
        zip(inputs.recordings["natural"].groups, inputs.recordings["natural"].tokens()[:, 0].tolist(), strict=True)
    )
    assert facts["conservation"]["holds"]
    assert facts["plans"] == []
    assert content["recordings"]["steered"]["facts"]["plans"] == [inputs.plans["plan"].hash]
    assert content["marks"][1]["experts"] == [[3, 5], [4, 2], [4, 7]]


def test_cards_hold_the_contexts_that_are_predicted(
    content: dict[str, Any], inputs: Inputs, demo: LanguageModel
) -> None:
    found = analysis.predict(inputs.traces["natural"], features=("token", "previous and token"))
    cards = {(card["layer"], card["expert"]): card for card in content["cards"]["cards"]}
    assert content["cards"]["trace"] == "natural"
    assert content["cards"]["tokens"] == list(found.tokens)
    assert cards.keys() == found.contexts.keys()
    (layer, expert), contexts = next((at, of) for at, of in found.contexts.items() if len(of) > 1)
    card = cards[layer, expert]
    for got, (previous, token, share, times) in zip(card["contexts"], contexts, strict=True):
        assert got[1] == demo.tokenizer.decode([token])
        assert got[0] == ("" if previous < 0 else demo.tokenizer.decode([previous]))
        assert (got[2], got[3]) == (pytest.approx(share, abs=1e-3), times)
    np.testing.assert_allclose(
        [np.nan if value is None else value for value in card["recall"]], found.recall[:, layer, expert], atol=1e-3
    )


def test_a_trace_that_cannot_tell_gives_no_cards(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    trace = inputs.traces["natural"]
    unknown = replace(trace, token=np.full_like(trace.token, -1))  # as of a model that is called with embeddings
    with caplog.at_level("INFO", "moe_route"):
        assert report.content_of(Inputs(traces={"no ids": unknown}))["cards"] is None
    assert any("the trace no ids gives no cards" in line for line in caplog.messages)
    assert report.content_of(Inputs(traces={"no ids": unknown, "ids": trace}))["cards"]["trace"] == "ids"


def test_cards_of_a_long_trace_count_a_part_of_its_texts(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = inputs.traces["natural"]
    monkeypatch.setattr("moe_route.report.content._CHOICES", len(trace) * 4 // 5 * 8 * 16)
    cards = report.content_of(Inputs(traces={"natural": trace}))["cards"]
    assert len(trace) // 3 < sum(cards["tokens"]) <= len(trace) * 4 // 5
    assert cards["cards"]


@pytest.mark.parametrize("place", [0, 1])
def test_experts_and_weights_of_tokens_are_those_of_the_trace(
    content: dict[str, Any], inputs: Inputs, place: int
) -> None:
    shown = content["traces"][place]
    trace = inputs.traces[shown["name"]]
    ids = unpacked(shown["ids"]).reshape(-1, *trace.ids.shape[1:])
    weights = unpacked(shown["weights"]).reshape(ids.shape) * shown["weights"]["scale"]
    start = 0
    for text in shown["texts"]:
        number = trace.items.index(text["item"]) if trace.items.count(text["item"]) == 1 else None
        group = trace.groups.index(text["group"])
        rows = [
            row
            for row in np.flatnonzero(trace.group == group)
            if trace.items[trace.sequence[row]] == text["item"] or trace.sequence[row] == number
        ]
        rows.sort(key=lambda row: trace.position[row])
        assert trace.token[rows].tolist() == text["ids"]
        here = slice(start, start + len(rows))
        assert (ids[here] == trace.ids[rows]).all()
        np.testing.assert_allclose(weights[here], trace.weights[rows], atol=shown["weights"]["scale"])
        start += len(rows)
    assert start == shown["tokens"] == len(trace)
    if shown["name"] == "steered":
        assert (ids[:, 3] == 5).any(-1).all()


def test_positions_count_the_tokens_that_were_left_out(content: dict[str, Any], demo: LanguageModel) -> None:
    assert all(text["positions"] is None for text in content["traces"][0]["texts"])
    with demo.attach() as routed, routed.record(["eng_Latn"], trace=True, special_tokens=False) as recorder:
        record_texts(recorder, demo, [Text("eng_Latn", "0", "The bus leaves.")])
    traces = {"without <s>": recorder.trace()}
    (text,) = report.content_of(Inputs(traces=traces), tokenizer=demo.tokenizer)["traces"][0]["texts"]
    assert text["positions"] == list(range(1, len(text["ids"]) + 1))


def test_values_that_are_no_numbers_are_shown_as_none(tmp_path: Path) -> None:
    table = '{"tables": [{"title": "T", "columns": ["a", "b"], "rows": [["x", null], ["y", 1.5]]}]}'
    (tmp_path / "t.json").write_text(table)
    path = report.write(tmp_path / "report.html", [tmp_path / "t.json"])
    assert '"rows":[["x",null],["y",1.5]]' in path.read_text("utf-8")


def test_pieces_join_to_the_text_also_where_characters_are_split(content: dict[str, Any], demo: LanguageModel) -> None:
    split = 0
    for text in content["traces"][0]["texts"]:
        parts = {i: part for i, part, _ in text["parts"]}
        joined = "".join(piece for i, piece in enumerate(text["pieces"]) if parts.get(i, 1) == 1)
        assert joined == demo.tokenizer.decode(text["ids"], clean_up_tokenization_spaces=False)
        assert TEXTS[text["group"]][int(text["item"])] in joined
        assert "\ufffd" not in joined
        split += len(parts)
    assert split  # the emoji take several tokens


def test_ids_are_shown_without_a_tokenizer() -> None:
    assert pieces_by_id([5, -1]) == [("5 ", 1, 1), ("? ", 1, 1)]


def test_bytes_that_are_no_character_stay_single_tokens(demo: LanguageModel) -> None:
    ids = demo.tokenizer("🦓", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert len(pieces_of(demo.tokenizer)(ids[:-1])) == len(ids) - 1


def test_hostile_text_stays_text(page_file: Path, content: dict[str, Any]) -> None:
    page = page_file.read_text("utf-8")
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "<title>A &quot;title&quot; with &lt;b&gt;&amp;amp;&lt;/b&gt; 🦓</title>" in page
    texts = {("".join(t["pieces"])) for t in content["traces"][0]["texts"] if t["group"] == "eng_Latn"}
    assert any("</script><script>document.title" in text for text in texts)
    assert HOSTILE[:20] == "</script><script>doc"


@pytest.mark.parametrize(
    "text", ["</script>", "<!--<script>", "]]>&amp;", "\u2028\u2029", "\ud83d", 'مرحبا 👩‍👩‍👧 \\ "']
)
def test_json_in_a_script_is_safe_and_whole(text: str) -> None:
    written = safe_json({"a": [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"a": [text]}
    written.encode("utf-8")


def test_the_page_names_nothing_elsewhere(page_file: Path) -> None:
    code = page_file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name space, never fetched
    assert not re.search(
        r"https?:|@import|url\(|src=", code.partition('id="data"')[0] + code.rpartition("</script>")[2]
    )
    assert "default-src 'none'" in code
    assert page_file.stat().st_size < 2e6


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, inputs: Inputs) -> None:
    class Broken:
        def decode(self, *_: Any, **__: Any) -> str:
            raise RuntimeError("no text")

    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="no text"):
        report.write(path, inputs, tokenizer=Broken())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_shown_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        report.write(tmp_path / "report.html", [])
    with pytest.raises(ValueError, match=r"no recording has the reference 'tlh_Latn'.*eng_Latn"):
        report.write(tmp_path / "report.html", inputs, reference="tlh_Latn")


def test_too_few_scores_give_no_correlation(inputs: Inputs) -> None:
    few = Inputs({"a": inputs.recordings["natural"]}, scores={"accuracy": {"deu_Latn": 1.0, "arb_Arab": 0.0}})
    content = report.content_of(few)
    assert content["recordings"]["a"]["correlations"] == []
    assert "scores accuracy: too few" in " ".join(content["warnings"]), "what is left out is said"


def test_scores_alone_are_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        report.content_of(Inputs(scores={"accuracy": {"eng_Latn": 0.5}}))


def test_unpaired_statistics_have_no_floor_and_say_why(inputs: Inputs, tmp_path: Path) -> None:
    inputs.recordings["natural"].save(tmp_path / "sums.safetensors", sequences=False)
    sums = RoutingStatistics.load(tmp_path / "sums.safetensors")
    with pytest.warns(UserWarning, match="pooled"):
        content = report.content_of(Inputs({"sums": sums}))
    assert content["recordings"]["sums"]["divergence"]["floor"] is None
    assert any("pooled" in warning for warning in content["warnings"])


def test_a_single_group_and_an_empty_one_need_no_divergence(inputs: Inputs) -> None:
    one = inputs.recordings["natural"].select(groups=["deu_Latn"])
    content = report.content_of(Inputs({"one": one}))
    assert content["recordings"]["one"]["divergence"] is None
    with pytest.raises(AnalysisError):  # so that the test above would fail if a group without tokens were analyzed
        analysis.divergence(one, "eng_Latn")


def test_texts_of_every_group_fit_into_little_room(inputs: Inputs) -> None:
    trace = inputs.traces["natural"]
    first = sum(trace.items[number] == "0" for number in trace.sequence.tolist())  # tokens of the first item
    few = chosen_sequences(trace, first * 4 * int(np.prod(trace.ids.shape[1:])))
    assert {int(trace.group[trace.sequence == n][0]) for n in few} == set(range(5))
    assert len(few) == 5
    assert len(chosen_sequences(trace, 10**9)) == len(trace.items)


def test_sequences_with_several_tokens_at_a_position_are_left_out(
    inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    trace = inputs.traces["natural"]
    beams = Trace(**{**vars(trace), "sequence": np.where(trace.sequence == 1, 0, trace.sequence).astype(np.int32)})
    assert 0 not in chosen_sequences(beams, 10**9)
    assert "1 sequences" in caplog.text


def test_files_of_every_kind_are_read(inputs: Inputs, tmp_path: Path) -> None:
    made = {
        "a.safetensors": inputs.recordings["natural"],
        "t.safetensors": inputs.traces["natural"],
        "s.json": inputs.selections["task"],
        "s.safetensors": inputs.selections["task"],
        "p.json": inputs.plans["plan"],
    }
    for name, thing in made.items():
        thing.save(tmp_path / name)
    (tmp_path / "accuracy.tsv").write_text("group\tscore\neng_Latn\t0.5\n")
    (tmp_path / "other.json").write_text('{"eng_Latn": 0.25}')
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "tables.json").write_text('{"tables": [{"title": "T", "columns": ["a"], "rows": [[1], [null]]}]}')
    row = {"language": "eng_Latn", "texts": 2, "loss": 3.0, "steered": 4.0, "change": 1, "low": 0, "high": 2}
    steer = {"plan": "ab", "unit": "nats", "languages": [{**row, "verdict": "unclear"}]}
    (tmp_path / "steer.json").write_text(json.dumps(steer))
    names = [*made, "accuracy.tsv", "other.json", "results", "steer.json"]
    found = report.read([tmp_path / name for name in names])
    assert found.recordings["a"] == inputs.recordings["natural"]
    assert len(found.traces["t"]) == len(inputs.traces["natural"])
    assert list(found.selections) == ["s", f"{tmp_path.name}/s"]
    assert found.plans["p"] == inputs.plans["plan"]
    assert found.scores == {"accuracy": {"eng_Latn": 0.5}, "other": {"eng_Latn": 0.25}}
    assert [table.title for table in found.results] == ["T", "Loss with and without a plan (steer)"]
    assert found.results[1].effect is not None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"eng_Latn": [1]}', "neither results nor a score per group"),
        ("a.json", '{"tables": [{"title": "T"}]}', 'lacks "columns"'),
        ("a.json", '{"tables": [{"title": "T", "columns": ["a"], "rows": [[1, 2]]}]}', "1 columns, and a row of 2"),
        (
            "a.json",
            '{"tables": [{"title": "T", "columns": ["a"], "rows": [], '
            '"effect": {"label": "a", "value": "a", "better": "a"}}]}',
            'better is "a": give "lower"',
        ),
        ("a.tsv", "eng_Latn\tnan\n", "score of eng_Latn is nan"),
        ("a.json", '{"eng_Latn": NaN}', "holds NaN"),
        ("a.tsv", "eng_Latn\t1\neng_Latn\t2\n", "eng_Latn comes twice"),
        ("a.tsv", "\n", "holds no score"),
        ("a.safetensors", "x", "safetensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read([tmp_path / name])
    with pytest.raises(ValueError, match=r"has no tables\.json"):
        report.read([tmp_path])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path / "a.safetensors", {}, {}, "weather")
    with pytest.raises(ValueError, match="kind 'weather'"):
        report.read([tmp_path / "a.safetensors"])


def test_figures_are_embedded_as_they_are(figures: tuple[Figure, ...]) -> None:
    content = report.content_of(Inputs(figures=figures), title="Figures", lead="below")
    assert (content["lead"], content["recordings"], content["traces"]) == ("below", {}, [])
    assert [one["name"] for one in content["figures"]] == ["u", "effect", "plain", "matrix"]
    assert content["figures"][1]["rows"]["English"] == [0.9, 0.2, [0.8, 0.7, 0.95]]
    assert content["figures"][0]["rows"][HOSTILE][1] is None
