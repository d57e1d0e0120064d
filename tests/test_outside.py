"""What others hold of this library: hashes of plans, bytes of saved files, keys of answers, columns of frames.

    python tests/test_outside.py

writes `tests/results/outside.json` anew. A change of that file is a change for users: it belongs into the changelog.
The recordings are of a model whose arithmetic is exact, so they are the same on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import shlex
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model
from harness.tiny_texts import Characters

import moe_route as mr
from moe_route import analysis
from moe_route.cli import main
from moe_route.data.batches import Text
from moe_route.experiments import (
    PromptPair,
    knockout,
    learn_routing,
    patch_experts,
    pruning_curve,
    regret,
    strength_sweep,
    transplant,
)
from moe_route.recording import SentenceVectors, SequenceStore, Trace, sentence_vectors
from moe_route.runs.language_model import LanguageModel

pytest.importorskip("transformers")

FROZEN = Path(__file__).parent / "results" / "outside.json"

# Commands whose --json is frozen: label, words. Files in braces are made by `files`; {out} is an empty folder.
_TEXTS = "--languages eng_Latn,deu_Latn --limit 2"
_BOTH = "--task {task} --baseline {general} --group eng_Latn"
COMMANDS = (
    ("describe", "describe --model {model}"),
    ("describe the weights", "describe --model {model} --load"),
    ("doctor", "doctor"),
    ("record", f"record --model {{model}} {_TEXTS} --trace {{out}}/t.safetensors --out {{out}}/s.safetensors"),
    ("record into a folder", "record --model {model} --data {lines} --out {out}/run"),
    ("vectors", f"record --model {{model}} {_TEXTS} --vectors mean --out {{out}}/v.safetensors"),
    ("convert", "convert {general} --to csv --out {out}/s.csv"),
    ("convert a plan", "convert {plan}"),
    ("convert a selection", "convert {selection} --to plan --out {out}/p.json"),
    ("formats", "convert --formats"),
    ("divergence", "analyze divergence {general} --correct floor --interval 0.9"),
    ("divergence and its shape", "analyze divergence {general} --shape --middle 1"),
    ("divergence of all pairs", "analyze divergence {general} --all-pairs --interval 0.9"),
    ("entropy", "analyze layers {general} --of entropy --normalized --interval 0.9"),
    ("consistency", "analyze layers {general} --of consistency"),
    ("load", "analyze layers {general} --of load-balance"),
    ("pairs in a layer", "analyze pairs {general}"),
    ("pairs across layers", "analyze pairs {general} --next"),
    ("paths", "analyze tokens {trace} --of paths --window 2"),
    ("paths by class", "analyze tokens {trace} --of paths --tokenizer {model} --classes script --min-tokens 2"),
    ("saturation", "analyze tokens {trace} --of saturation --final {trace}"),
    ("vocabulary", "analyze tokens {trace} --of vocabulary --tokenizer {model} --min-tokens 1"),
    ("token classes", "analyze tokens {trace} --of class-routing --tokenizer {model}"),
    ("locality", "analyze tokens {trace} --of local-consistency --segment 4"),
    ("task experts", f"analyze experts {_BOTH} --threshold 0.02 --out {{out}}/s.json --plan {{out}}/p.safetensors"),
    ("multilingual experts", "analyze experts --task {general} --rule multilingual --threshold 0.02"),
    ("risk experts", f"analyze experts {_BOTH} --rule risk --top-n 4"),
    ("share experts", "analyze experts --task {general} --rule share --per-layer 2 --threshold 0.3"),
    ("entropy experts", "analyze experts --task {general} --rule entropy --top-n 3 --percentile 50"),
    ("esft experts", "analyze experts --task {general} --rule esft --group eng_Latn --top-p 0.3"),
    ("rise experts", "analyze experts --task {general} --rule rise --top-n 3"),
    ("stable experts", f"analyze experts {_BOTH} --threshold 0.02 --stability 5"),
    ("committee", "analyze experts {general} --rule committee --per-layer 2"),
    ("super experts", "analyze experts {general} --rule super --quantile 0.5"),
    ("difference", f"analyze experts {_BOTH} --rule difference --resamples 20"),
    ("thresholds", f"analyze experts {_BOTH} --threshold 0.02,0.05"),
    ("overlap", "analyze overlap {selection} {other}"),
    ("saliency", "analyze saliency {general} --pool"),
    ("pruning", "prune {general} --keep 0.5 --resamples 5"),
    ("geometry", "analyze geometry {general} --reference eng_Latn"),
    ("geometry with weights", "analyze geometry {general} --model {model} --weights"),
    ("similarity", "analyze similarity {general} --clusters 2 --target deu_Latn"),
    ("similarity of vectors", "analyze similarity {vectors}"),
    ("alignment", "analyze similarity {vectors} --reference eng_Latn --accuracy 0.8"),
    ("alignment of routing", "analyze similarity {general} --reference eng_Latn --scores {scores}"),
    ("correlation", "analyze correlation {general} --scores {scores}"),
    ("correlation with covariates", "analyze correlation {general} --scores {scores} --fertility --interval 0.9"),
    ("plot", "plot entropy {general} --out {out}/e.svg"),
    ("plan make", "plan make activate 1:0-1,3=0.5 --groups eng_Latn --out {out}/p.json"),
    ("plan make for layers", "plan make temperature --value 2 --layers 1-2"),
    ("recipes", "plan make"),
    ("plan show", "plan show {plan}"),
    ("plan add", "plan add {plan} {plan} --times 0.5 --out {out}/p.json"),
    ("plan diff", "plan show {plan} {compound}"),
    ("plan explain", "plan show {compound} --on {general}"),
    ("plan learn", f"plan learn --model {{model}} {_TEXTS} --steps 1 --out {{out}}/p.json"),
    ("plan neighbors", "plan neighbors --solved {general} --new {task} --group eng_Latn --out {out}/p.safetensors"),
    ("strengths", f"steer --plan {{plan}} --model {{model}} {_TEXTS} --strengths 1,2 --controls 1"),
    ("steer", f"steer --plan {{plan}} --model {{model}} {_TEXTS}"),
    ("steer a prompt", "steer --plan {plan} --model {model} --prompt abc --max-new-tokens 2"),
    ("knockout", f"experiment knockout --model {{model}} {_TEXTS} --layers 1"),
    ("patch", "experiment patch --model {model} --pairs {pairs} --layers 1"),
    ("regret", f"experiment regret --model {{model}} {_TEXTS} --routes 2"),
    ("transplant", f"experiment transplant --model {{model}} {_TEXTS} --kinds own --band middle=1"),
    ("pruning curve", f"prune {{general}} --model {{model}} {_TEXTS} --keep 0.5 --measure"),
    ("prune", "prune {general} --model {model} --keep 0.5 --out {out}/smaller"),
    ("upcycle", "upcycle {dense} --languages eng_Latn,swh_Latn --out {out}/sparse --plan {out}/p.json"),
    ("merge", "merge {model} {model} --method linear --out {out}/merged"),
    ("merge by layers", "merge {model} {model} --method layers --bottom 1 --top 0 --out {out}/merged"),
    ("difference of models", "merge {model} --base {model} --method difference"),
    ("studies", "eval --list"),
    ("report", "report {general} {trace} --tokenizer {model} --out {out}/r.html"),
)
# Left out, since they take longer: bench, demo, a whole eval. lm-eval has no --json.

# A plan of each kind of rule, with its hash and file frozen.
PLANS: dict[str, Callable[[], Any]] = {
    "activate": lambda: mr.Plan.activate({0: [1], 2: {3: 0.5}}, strength=0.25),
    "deactivate": lambda: mr.Plan.deactivate({0: [1, 4]}),
    "bias": lambda: mr.Plan.bias({0: {1: -0.5}}),
    "magnitude": lambda: mr.Plan.magnitude({0: [1]}),
    "scale_logits": lambda: mr.Plan.scale_logits({0: [1]}, strength=2),
    "scale_weights": lambda: mr.Plan.scale_weights({0: [1]}, strength=2),
    "temperature": lambda: mr.Plan.temperature(2, layers=[0, 2]),
    "force_on": lambda: mr.Plan.force_on({0: [1]}, weight="steermoe"),
    "force_off": lambda: mr.Plan.force_off({0: [1]}),
    "forbid": lambda: mr.Plan.forbid({0: [1]}),
    "top_k": lambda: mr.Plan.top_k(1),
    "remap": lambda: mr.Plan.remap({0: {1: 2, 3: -1}}),
    "replace_scores": lambda: mr.Plan.replace_scores({0: {1: 0.5}}),
    "reserve_slot": lambda: mr.Plan.reserve_slot({0: [1]}),
    "fix_choice": lambda: mr.Plan.fix_choice({0: [1, 2]}),
    "replay": lambda: mr.Plan.replay(torch.zeros(1, 4, 3, 1, dtype=torch.int64)),
    "gumbel": lambda: mr.Plan.gumbel(1),
    "conditions": lambda: mr.Plan.forbid({0: [1]}).only(groups=["a", "b"], phase="decode", positions=range(4)),
    "absent": lambda: mr.Plan.activate({0: [1]}).only(positions=[2], absent=True),
    "sum": lambda: mr.Plan.activate({0: [1]}) * 2 + mr.Plan.forbid({1: [0]}).only(phase="prefill"),
}

GROUPS = ("eng_Latn", "deu_Latn", "swh_Latn", "jpn_Jpan")
EXPERTS, LAYERS = 8, 3


# ---- a model whose arithmetic is exact


def plain_model() -> Any:
    model = tiny_model("qwen3_moe", head=True, rms_norm_eps=0.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1  # that of padding would be 0, which has no norm
    return model


def exact_model() -> Any:
    """A tiny sparse model whose router logits are the same to the last bit, in whichever order they are added.

    Hidden states are +1 or -1 and stay as embedded, since attention and experts add zero. Their norm is one, and the
    weights of the routers are small multiples of 1/64.
    """
    model = plain_model()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(torch.randint(0, 2, parameter.shape, generator=draw) * 2 - 1)
            elif name.endswith("gate.weight"):
                parameter.copy_(torch.randint(-9, 10, parameter.shape, generator=draw) / 64)
            elif parameter.dim() == 1:
                parameter.fill_(1)
    return model


def recorded(model: Any, seed: int) -> tuple[mr.RoutingStatistics, Trace]:
    """Ten items in four groups, one of them padded, and two steps of decoding; everything that can be recorded."""
    draw = torch.Generator().manual_seed(seed)
    asked: dict[str, Any] = {"sequences": True, "trace": True, "consistency": True, "pairs": True}
    with mr.attach(model, engine="fused") as routed:
        with routed.record(GROUPS, **asked, expert_outputs=True, hidden=True) as recorder, torch.inference_mode():
            for item in range(10):
                ids = torch.randint(3, 128, (len(GROUPS), 4 + item % 3), generator=draw)
                mask = torch.ones_like(ids)
                mask[0, :2] = 0
                with recorder.labels(groups=list(GROUPS), items=[f"item {item}"] * len(GROUPS)):
                    past = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
                    for _ in range(2):
                        mask = torch.cat([mask, mask[:, -1:]], 1)
                        step = torch.randint(3, 128, (len(GROUPS), 1), generator=draw)
                        model(input_ids=step, attention_mask=mask, past_key_values=past)
        return recorder.statistics(), recorder.trace()


def texts() -> list[Text]:
    """Ten items in two groups."""
    words = {"eng_Latn": "sentence", "deu_Latn": "Satz"}
    return [Text(group, f"item {number}", f"{number} {words[group]}") for group in words for number in range(10)]


@functools.cache
def made() -> dict[str, Any]:
    """What is saved and asked below: two recordings of a random model, and one of the exact model."""
    model = plain_model()
    statistics, trace = recorded(model, 1)
    task, _ = recorded(model, 2)
    exact, exact_trace = recorded(exact_model(), 1)
    return {
        "model": model,
        "language_model": LanguageModel("tiny", model, Characters()),
        "exact": exact,
        "exact trace": exact_trace,
        "statistics": statistics,
        "task": task,
        "trace": trace,
        "vectors": sentence_vectors(model, Characters(), texts()),
        "selection": mr.ExpertSelection(
            {0: [1, 2], 2: [3]}, scores={0: {1: 0.5, 2: 0.25}, 2: {3: 0.125}}, threshold=0.125, num_experts=EXPERTS
        ),
    }


# ---- files for commands


def tokenizer() -> Any:
    """A tokenizer with a token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *map(chr, range(3, 128))]
    fast = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="\x03"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def files(folder: Path) -> dict[str, Path]:
    """The files that the words of `COMMANDS` name."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    paths = {name: folder / f"{name}.safetensors" for name in ("general", "task", "trace", "vectors", "plan")}
    paths |= {name: folder / f"{name}.json" for name in ("selection", "other", "even", "compound")}
    paths |= {name: folder / f"{name}.tsv" for name in ("scores", "pairs")}
    paths |= {"lines": folder / "lines.jsonl", "model": folder / "model", "dense": folder / "dense"}
    things = made()
    for name, thing in (("general", "statistics"), ("task", "task"), ("trace", "trace"), ("vectors", "vectors")):
        things[thing].save(paths[name])
    things["selection"].save(paths["selection"])
    mr.ExpertSelection({0: [2], 1: [0]}, num_experts=EXPERTS).save(paths["other"])
    mr.ExpertSelection({layer: [0] for layer in range(LAYERS)}, num_experts=EXPERTS).save(paths["even"])
    mr.Plan.activate({0: [1]}).save(paths["plan"])
    (mr.Plan.activate({0: [1]}) + mr.Plan.forbid({1: [0]}).only(groups="eng_Latn")).save(paths["compound"])
    paths["scores"].write_text("".join(f"{group}\t{score}\n" for score, group in enumerate(GROUPS)))
    paths["pairs"].write_text("Mary said\tTony said\tx\ty\nMary said\tTony said\ty\tx\n")
    paths["lines"].write_text("".join(json.dumps({"text": text.text}) + "\n" for text in texts()))
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    for name, model in (
        ("model", things["model"]),
        ("dense", Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))),
    ):
        model.save_pretrained(paths[name])
        tokenizer().save_pretrained(paths[name])
    return paths


# ---- what is frozen


def plans() -> dict[str, dict[str, str]]:
    """Of each plan its hash, and the SHA-256 of its file as JSON and as tensors."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, make in PLANS.items():
            plan = make()
            found[kind] = {"hash": plan.hash}
            text, tensors = Path(name) / "plan.json", Path(name) / "plan.safetensors"
            for path in (text, tensors):
                plan.save(path)
                assert mr.Plan.load(path).hash == plan.hash
            found[kind]["json"] = sha256(text.read_text("utf-8").replace(mr.__version__, "VERSION").encode())
            found[kind]["safetensors"] = sha256(json.dumps(content_of(tensors)).encode())
    return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def saved() -> dict[str, dict[str, Any]]:
    """Of each saved object its tensors (dtype, shape, SHA-256) and its metadata, as far as it is the same anywhere."""
    things = made()
    statistics = things["exact"]
    assert isinstance(statistics.store, SequenceStore)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, thing in (("statistics", "exact"), ("trace", "exact trace"), ("selection", "selection")):
            path = Path(name) / f"{kind}.safetensors"
            things[thing].save(path)
            found[kind] = content_of(path)
        store = Path(name) / "store.safetensors"
        statistics.store.save(store)
        found["store"] = {**content_of(store), "content hash": statistics.store.content_hash()}
        path = Path(name) / "selection.json"
        things["selection"].save(path)
        found["selection as JSON"] = parsed(path.read_text("utf-8"))
    return found


def content_of(path: Path) -> dict[str, Any]:
    """The header and the tensors of a safetensors file, read by its format alone."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    metadata = {key: parsed(text) for key, text in header.pop("__metadata__", {}).items()}
    tensors = {}
    for name, entry in sorted(header.items()):
        first, last = entry["data_offsets"]
        tensors[name] = f"{entry['dtype']} {'x'.join(map(str, entry['shape']))} {sha256(body[first:last])}"
    return {"metadata": metadata, "tensors": tensors}


def parsed(text: str) -> Any:
    """A text of JSON, without what another version or machine writes differently."""
    return without_versions(json.loads(text.replace(mr.__version__, "VERSION")))


# versions of libraries, and hashes into which they enter: a configuration's keys differ from one version to the next
_VARIES = ("versions", "config_hash", "sha256")


def without_versions(value: Any) -> Any:
    """The same with versions, and hashes of them, replaced by their type, and so the library that runs the experts."""
    if isinstance(value, dict):
        return {
            key: type(item).__name__
            if key in _VARIES or (key, type(item)) == ("experts", list)
            else without_versions(item)
            for key, item in value.items()
        }
    return [without_versions(item) for item in value] if isinstance(value, list) else value


def answers() -> dict[str, Any]:
    """Keys and types of what each command prints with --json."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        paths = files(Path(name))
        for number, (label, words) in enumerate(COMMANDS):
            out = Path(name) / str(number)
            out.mkdir()
            printed, said = io.StringIO(), io.StringIO()
            arguments = [word.format(**paths, out=out) for word in shlex.split(words)]
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
                try:
                    code = main([*arguments, "--json"])
                except SystemExit as leaving:
                    code = leaving.code
            assert not code, f"moe-route {' '.join(arguments)}: {said.getvalue()}"
            found[label] = shape_of(json.loads(printed.getvalue()))
    # what is below differs from one machine to the next
    found["doctor"] = {key: type(value).__name__ for key, value in found["doctor"].items()}
    return found


_DATA = ((re.compile(r"-?\d+"), "(number)"), (re.compile(r"[a-z]{3}_[A-Z][a-z]{3}"), "(language)"))


def shape_of(value: Any) -> Any:
    """Keys with types in place of values; keys that are numbers or languages as one, elements of a list as one."""
    if isinstance(value, dict):
        shape: dict[str, Any] = {}
        for key, item in value.items():
            name = next((what for pattern, what in _DATA if pattern.fullmatch(key)), key)
            shape[name] = joined(shape[name], shape_of(item)) if name in shape else shape_of(item)
        return shape
    if isinstance(value, list):
        return [functools.reduce(joined, map(shape_of, value))] if value else []
    return "null" if value is None else type(value).__name__


def joined(a: Any, b: Any) -> Any:
    """One shape for two: all keys of both, and both types."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: joined(a.get(key, b.get(key)), b.get(key, a.get(key))) for key in a | b}
    if isinstance(a, list) and isinstance(b, list):
        return [joined(a[0], b[0])] if a and b else a or b
    if a == b:
        return a
    both = {one if isinstance(one, str) else json.dumps(one) for one in (a, b)}
    return " or ".join(sorted({part for one in both for part in one.split(" or ")}))


_EXPERIMENT = {"resamples": 20, "permutations": 20}


def _experiments(things: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    model, given = things["language_model"], texts()
    plan = mr.Plan.activate({0: [1]})
    pairs = [PromptPair("Mary said", "Tony said", *answers) for answers in ("xy", "yx")]  # one of them the model tells
    yield "knockout", knockout(model, given, layers=[1], **_EXPERIMENT)
    yield "regret", regret(model, given, routes=2, **_EXPERIMENT)
    yield "transplant", transplant(model, given, kinds=["own"], **_EXPERIMENT)
    yield "pruning curve", pruning_curve(model, given, things["statistics"], criteria=["reap"], keep=[0.5])
    yield "strengths", strength_sweep(model, given, plan, [1.0, 2.0], controls=1)
    yield "patching", patch_experts(model, pairs, layers=[1], **_EXPERIMENT)
    yield "learned", learn_routing(model, given, layers=[1], steps=1)


def _results(things: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every result that has a frame: label, object."""
    import pandas as pd

    statistics, task, trace, vectors = (things[name] for name in ("statistics", "task", "trace", "vectors"))
    away = analysis.divergence(statistics, "eng_Latn")
    scores = {group: float(place) for place, group in enumerate(GROUPS)}
    both = {"group": "eng_Latn", "baseline_group": "deu_Latn"}

    def rule(a: Any, b: Any) -> mr.ExpertSelection:
        return analysis.task_experts(a, b, group="eng_Latn", threshold=0.02)

    yield "divergence", away
    yield "divergence above its floor", analysis.divergence(statistics, "eng_Latn", correct="floor")
    yield "divergence of all pairs", analysis.divergence_matrix(statistics)
    yield "shape", analysis.u_shape(away, middle=[1])
    yield "entropy", analysis.entropy(statistics)
    yield "token entropy", analysis.entropy(statistics, of="token")
    yield "entropy of counts", analysis.entropy(statistics, kind="count", correct="jackknife")
    yield "consistency", analysis.consistency(statistics)
    yield "load", analysis.load_balance(statistics)
    yield "pairs in a layer", analysis.coactivation(statistics)
    yield "pairs across layers", analysis.transitions(statistics)
    yield "paths", analysis.paths(trace, window=2)
    yield "saturation", analysis.saturation(trace, trace)
    yield "vocabulary", analysis.vocabulary(trace, min_tokens=1)
    yield "token classes", analysis.class_routing(trace, ["odd" if token % 2 else "even" for token in range(128)])
    yield "locality", analysis.local_consistency(trace, segment=4)
    yield "committee", analysis.committee(statistics, top=2)
    yield "difference", analysis.expert_difference_interval(task, statistics, **both, resamples=20)
    yield "thresholds", analysis.sweep(task, statistics, reference="eng_Latn", group="eng_Latn", thresholds=[0.02, 0.1])
    yield "overlap", analysis.overlap({"a": rule(task, statistics), "b": things["selection"]}, num_experts=EXPERTS)
    yield "stability", analysis.stability_selection(rule, task, statistics, resamples=5)
    yield "risk", analysis.risk_experts(task, statistics, **both, top_n=4)
    yield "saliency", analysis.saliency(statistics)
    yield "super experts", analysis.super_experts(statistics, quantile=0.5)
    yield "pruning stability", analysis.pruning_stability(statistics, keep=0.5, resamples=5)
    yield "geometry", analysis.geometry(statistics, "eng_Latn")
    yield "geometry with weights", analysis.geometry(statistics, "eng_Latn", weights=_gates(things["model"]))
    alike = analysis.similarity(statistics)
    yield "similarity", alike
    yield "matrices", alike.compare(pd.DataFrame(np.eye(4), GROUPS, GROUPS), permutations=20)
    yield "similarity of vectors", analysis.similarity(vectors)
    yield "alignment", analysis.alignment(vectors, "eng_Latn")
    yield "alignment of routing", analysis.alignment(statistics, "eng_Latn")
    yield "correlation", analysis.correlation(away, scores, permutations=20)
    yield (
        "rank agreement",
        analysis.rank_agreement(
            {"frequency": np.arange(24.0).reshape(1, 3, 8)}, np.arange(24.0).reshape(1, 3, 8), permutations=20
        ),
    )
    yield "statistics", statistics
    yield "trace", trace
    yield "explanation", mr.Plan.activate({0: [1]}).explain(statistics)


def _gates(model: Any) -> list[np.ndarray]:
    return [weight.detach().numpy() for name, weight in model.named_parameters() if name.endswith("gate.weight")]


def frames() -> dict[str, dict[str, str]]:
    """Columns of each frame, in their order, with their dtypes."""
    things = made()
    found = {}
    for label, result in (*_results(things), *_experiments(things)):
        found[label] = columns(result.to_pandas())
    found["scalars of statistics"] = columns(things["statistics"].scalars_to_pandas())
    return found


def columns(frame: Any) -> dict[str, str]:
    assert len(frame) > 0
    # pandas 3 calls a column of texts str
    return {str(name): str(dtype).replace("object", "str") for name, dtype in frame.dtypes.items()}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plans": plans,
    "saved": saved,
    "answers": answers,
    "frames": frames,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_the_outside_is_as_it_was(section: str) -> None:
    pytest.importorskip("pandas")
    now, before = json.loads(json.dumps(SECTIONS[section]())), json.loads(FROZEN.read_text())[section]
    changed = [label for label in {**now, **before} if now.get(label) != before.get(label)]
    assert not changed, f"changed: {changed}; if on purpose, python tests/test_outside.py writes it anew"
    assert now == before


def test_vectors_are_read_again(tmp_path: Path) -> None:
    made()["vectors"].save(tmp_path / "v.safetensors")
    read = SentenceVectors.load(tmp_path / "v.safetensors")
    assert read.groups == ("eng_Latn", "deu_Latn")
    assert list(content_of(tmp_path / "v.safetensors")["tensors"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole = {name: make() for name, make in SECTIONS.items()}
    parts = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f" {json.dumps(label)}: {json.dumps(what)}" for label, what in part.items())
        for name, part in whole.items()
    ]  # a label is a line, so that a change is seen where it is
    FROZEN.write_text("{\n" + "\n},\n".join(parts) + "\n}\n}\n", encoding="utf-8")
