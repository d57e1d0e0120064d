"""Upcycling against its alternatives, on real text in ten languages of five families.

    python examples/neighbours/upcycling_text.py --data DATA/ntrex128 \\
        --out RESULTS.json --page docs/training.md --picture EXPERTS.png    # three seeds, half an hour on two cores
    python examples/neighbours/upcycling_text.py --steps 20 --seeds 1       # a short form, on the shipped corpus

DATA/ntrex128 is NTREX-128 as distributed: 1997 lines of news in each language, of which the last 100 are held out.
Without it, the sentences of the shipped corpus are used (72 in each language, 12 held out), which shows that the script
runs and nothing else.

A dense model is trained by this script. Then it is trained on in several ways, on the same windows of text, each of one
language: dense; upcycled under the family plan (hybrid-k, k = 2); upcycled with plain top-k (k = 2); upcycled and
routed by the label (k = 1). Either the last two layers are upcycled, or all of them, which shows by layer where
languages part. Measured are held-out nats per token in each language, the share of tokens that choose the expert of
their own family, and the divergence between languages of their expert shares.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from seeds import add_outputs, told, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import moe_route as mr
from moe_route.data.batches import Batch, encode, padded_batches, texts_of
from moe_route.data.languages import language_name
from moe_route.recording import RoutingStatistics

NTREX = {
    "eng_Latn": "src.eng", "rus_Cyrl": "ref.rus", "deu_Latn": "ref.deu", "fra_Latn": "ref.fra", "jpn_Jpan": "ref.jpn",
    "zho_Hans": "ref.zho-CN", "arb_Arab": "ref.arb", "hin_Deva": "ref.hin", "ind_Latn": "ref.ind",
    "swh_Latn": "ref.swa",
}  # fmt: skip
LANGUAGES = tuple(NTREX)
FAMILIES = mr.data.families_of(LANGUAGES)
EXPERT = {code: list(dict.fromkeys(FAMILIES.values())).index(family) for code, family in FAMILIES.items()}
HIDDEN, INTERMEDIATE, LAYERS = 96, 256, 6
VOCABULARY = 2048
LENGTH, BATCH, PEAK = 64, 16, 3e-3  # tokens of a window, windows of a step, highest learning rate
LONGEST = 128  # tokens of a held-out sentence
LAST, ALL = "last 2 layers", f"all {LAYERS} layers"


def corpus(folder: Path | None) -> tuple[mr.data.Corpus, mr.data.Corpus]:
    """Text to train on, and held-out text."""
    if folder is None:
        whole, held_out = mr.data.demo_corpus().subset(LANGUAGES), 12
    else:
        files = {code: folder / "NTREX-128" / f"newstest2019-{name}.txt" for code, name in NTREX.items()}
        texts = {code: path.read_text("utf-8").rstrip("\n").split("\n") for code, path in files.items()}
        items = [f"line {number}" for number in range(1, len(texts["eng_Latn"]) + 1)]
        whole, held_out = mr.data.Corpus(LANGUAGES, tuple(items), {c: tuple(t) for c, t in texts.items()}), 100
    rest = {code: whole[code][-held_out:] for code in LANGUAGES}
    return whole.subset(limit=len(whole) - held_out), mr.data.Corpus(LANGUAGES, whole.items[-held_out:], rest)


def train_tokenizer(text: mr.data.Corpus) -> Any:
    """Byte-level BPE of the text, which puts <s> before every sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence for code in LANGUAGES for sentence in text[code]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


class Windows:
    """Batches of windows of text, each of one language: sentences end to end, in another order in each epoch."""

    def __init__(self, tokenizer: Any, text: mr.data.Corpus, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.sentences = [[np.array(row) for row in tokenizer(list(text[code])).input_ids] for code in LANGUAGES]
        self.streams = [self._stream(sentences) for sentences in self.sentences]

    def _stream(self, sentences: list[np.ndarray]) -> Iterator[np.ndarray]:
        kept = np.zeros(0, dtype=np.int64)
        while True:
            for index in self.generator.permutation(len(sentences)):
                kept = np.concatenate([kept, sentences[index]])
                while len(kept) >= LENGTH:
                    yield kept[:LENGTH]
                    kept = kept[LENGTH:]

    def batch(self) -> tuple[Tensor, list[str]]:
        """Tokens [BATCH, LENGTH], and the language of each window."""
        drawn = self.generator.integers(len(LANGUAGES), size=BATCH)
        tokens = np.stack([next(self.streams[language]) for language in drawn])
        return torch.from_numpy(tokens), [LANGUAGES[language] for language in drawn]


def dense_model(tokenizer: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HIDDEN // 4,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train(model: Any, batches: list[tuple[Tensor, list[str]]], plan: mr.Plan | None = None) -> float:
    """Train on the batches, under a plan if there is one. Returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.1, betas=(0.9, 0.95))
    steps = len(batches)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 30) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    start = time.perf_counter()

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    if plan is None:
        for tokens, _ in batches:
            step(tokens)
    else:
        with mr.attach(model) as routed, routed.steer(plan):
            for tokens, languages in batches:
                with routed.labels(groups=languages):
                    step(tokens)
    return time.perf_counter() - start


def held_out_batches(tokenizer: Any, text: mr.data.Corpus) -> list[Batch]:
    encoded = encode(tokenizer, texts_of(text), limit=LONGEST)
    return list(padded_batches(tokenizer, encoded, batch_size=BATCH, device="cpu"))


@torch.no_grad()
def nats_of(model: Any, batches: list[Batch], routed: mr.RoutedModel | None = None) -> dict[str, float]:
    """Nats per token in each language."""
    total, tokens = dict.fromkeys(LANGUAGES, 0.0), dict.fromkeys(LANGUAGES, 0)
    for batch in batches:
        groups = [text.group for text in batch.texts]
        with nullcontext() if routed is None else routed.labels(groups=groups):
            logits = model(**batch.inputs, use_cache=False).logits
        ids, real = batch.inputs["input_ids"][:, 1:], batch.inputs["attention_mask"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids, reduction="none") * real
        for group, nats, count in zip(groups, each.sum(1).tolist(), real.sum(1).tolist(), strict=True):
            total[group] += nats
            tokens[group] += count
    return {code: total[code] / tokens[code] for code in LANGUAGES}


def measure(model: Any, held_out: list[Batch], plan: mr.Plan | None, sparse: bool) -> dict[str, Any]:
    """Loss on held-out text, and the routing of a sparse model."""
    model.eval()
    if not sparse:
        return loss_of(nats_of(model, held_out))
    with mr.attach(model) as routed, routed.record() as recorder, nullcontext() if plan is None else routed.steer(plan):
        nats = nats_of(model, held_out, routed)
    return {**loss_of(nats), **routing_of(recorder.statistics())}


def loss_of(nats: Mapping[str, float]) -> dict[str, Any]:
    return {"loss": float(np.mean(list(nats.values()))), "languages": dict(nats)}


def routing_of(statistics: RoutingStatistics) -> dict[str, Any]:
    """Own-expert share, expert shares and the divergence between languages by layer."""
    # The share of tokens that choose an expert, [language, layer, expert].
    shares = statistics.frequency(by="token")[[statistics.groups.index(code) for code in LANGUAGES]]
    own = [float(shares[i, :, EXPERT[code]].mean()) for i, code in enumerate(LANGUAGES)]
    # Pairs of languages: one value for each layer, of all tokens of a language together.
    matrix = mr.analysis.divergence_matrix(statistics, groups=LANGUAGES, pairing="pooled", kind="count", by="token")
    rows, others = np.triu_indices(len(LANGUAGES), 1)
    divergence = matrix.values[:, rows, others].mean(1)
    return {
        "own": float(np.mean(own)),
        "shares": np.round(shares, 3).tolist(),
        "divergence": divergence.tolist(),
        "spread": spread(divergence.tolist()),
    }


def spread(divergence: list[float]) -> float:
    """Mean of the last third of the layers minus that of the first third."""
    third = max(1, len(divergence) // 3)
    return float(np.mean(divergence[-third:]) - np.mean(divergence[:third]))


def flops(vocabulary: int, layers: int = 0, experts_run: int = 0) -> float:
    """Multiplications per token in the matrices of a model whose last `layers` layers run `experts_run` experts."""
    block = 3 * HIDDEN * INTERMEDIATE
    router = layers * HIDDEN * len(set(FAMILIES.values()))
    attention = LAYERS * 4 * HIDDEN * HIDDEN
    return attention + (LAYERS - layers + layers * experts_run) * block + router + HIDDEN * vocabulary


class Way(NamedTuple):
    """A way of training on."""

    layers: int  # number of sparse layers, the last ones; 0: dense
    top_k: int = 0
    plan: bool = False  # train under the family plan
    label: bool = False  # measure under it, too


WAYS = {
    "dense": Way(0),
    f"hybrid-k, k = 2, {LAST}": Way(2, 2, plan=True),
    f"plain top-k, k = 2, {LAST}": Way(2, 2),
    f"by label, k = 1, {LAST}": Way(2, 1, plan=True, label=True),
    f"hybrid-k, k = 2, {ALL}": Way(LAYERS, 2, plan=True),
    f"plain top-k, k = 2, {ALL}": Way(LAYERS, 2),
    f"by label, k = 1, {ALL}": Way(LAYERS, 1, plan=True, label=True),
}
DRAWN = f"hybrid-k, k = 2, {ALL}"
LONGER = f"dense, as many FLOPs as k = 2, {LAST}"
BEFORE, UNTRAINED = "dense, before", f"upcycled, k = 2, {ALL}, before"


def one_seed(seed: int, steps: int, folder: Path | None) -> dict[str, Any]:
    """Every way of training on from one dense model."""
    torch.set_num_threads(1)  # a process per seed
    training, rest = corpus(folder)
    tokenizer = train_tokenizer(training)
    held_out, windows = held_out_batches(tokenizer, rest), Windows(tokenizer, training, seed)
    cost = flops(len(tokenizer))
    longer = round(steps * flops(len(tokenizer), 2, 2) / cost)
    first, more = ([windows.batch() for _ in range(number)] for number in (steps, longer))
    start = dense_model(tokenizer, seed)
    results: dict[str, Any] = {}

    def add(name: str, way: Way, batches: list[tuple[Tensor, list[str]]], model: Any = None) -> None:
        plan = None
        if model is None:
            model = dense_model(tokenizer, seed)
            model.load_state_dict(start.state_dict())
        if way.layers:
            layers = range(LAYERS - way.layers, LAYERS)
            options = {"top_k": way.top_k, "fixed_by_label": way.label, "seed": seed}
            model, plan = mr.training.upcycle(model, families=FAMILIES, layers=layers, **options)
        seconds = train(model, batches, plan if way.plan else None) if batches else 0.0
        found = measure(model, held_out, plan if way.label else None, way.layers > 0)
        if name != DRAWN:
            found.pop("shares", None)
        found |= {"seconds": seconds, "tokens": len(batches) * BATCH * LENGTH}
        results[name] = {**found, "flops": flops(len(tokenizer), way.layers, way.top_k) / cost}
        print(f"seed {seed}: {name}: {found['loss']:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    add(BEFORE, Way(0), first, start)
    results[BEFORE]["tokens"] = 0
    add(UNTRAINED, Way(LAYERS, 2), [])
    for name, way in WAYS.items():
        add(name, way, more[:steps])
    add(LONGER, Way(0), more)
    return results


# Names of two ways, what is compared, and at what.
COMPARED = [
    (f"by label, k = 1, {LAST}", "dense", "loss", "equal FLOPs"),
    (f"by label, k = 1, {ALL}", "dense", "loss", "equal FLOPs"),
    (f"hybrid-k, k = 2, {LAST}", "dense", "loss", "equal tokens"),
    (f"hybrid-k, k = 2, {LAST}", LONGER, "loss", "equal FLOPs"),
    (f"hybrid-k, k = 2, {ALL}", "dense", "loss", "equal tokens"),
    (f"hybrid-k, k = 2, {LAST}", f"plain top-k, k = 2, {LAST}", "loss", "equal tokens"),
    (f"hybrid-k, k = 2, {ALL}", f"plain top-k, k = 2, {ALL}", "loss", "equal tokens"),
    (f"hybrid-k, k = 2, {LAST}", f"plain top-k, k = 2, {LAST}", "own", "inference"),
    (f"hybrid-k, k = 2, {ALL}", f"plain top-k, k = 2, {ALL}", "own", "inference"),
]


def tables(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    seeds = results["seeds"]
    parts = (of_ways(seeds), of_pairs(seeds), of_languages(seeds), of_layers(seeds))
    return "\n\n".join("\n".join(part) for part in parts)


def of_ways(seeds: list[dict[str, Any]]) -> list[str]:
    lines = ["| trained on as | loss | own expert | FLOPs per token | tokens | seconds |", "|---|---|---|---|---|---|"]
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        own = f"{np.mean([row['own'] for row in rows]):.2f}" if "own" in rows[0] else ""
        cells = [name, told([row["loss"] for row in rows], ".3f"), own, f"{rows[0]['flops']:.2f}"]
        cells += [f"{rows[0]['tokens']:,}", f"{np.median([row['seconds'] for row in rows]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_pairs(seeds: list[dict[str, Any]]) -> list[str]:
    lines = ["| difference | at | mean over seeds |", "|---|---|---|"]
    for one, other, what, at in COMPARED:
        values = [seed[one][what] - seed[other][what] for seed in seeds]
        lines.append(f"| {what}: {one} minus {other} | {at} | {told(values, '+.3f')} |")
    return lines


def of_languages(seeds: list[dict[str, Any]]) -> list[str]:
    """Loss minus that of the dense model, by language and family."""
    names = [name for name, way in WAYS.items() if way.layers == 2]
    lines = ["| language | dense | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    of_family = {family: [code for code in LANGUAGES if FAMILIES[code] == family] for family in FAMILIES.values()}
    rows = {code: [code] for code in LANGUAGES}
    rows |= {f"**{family}**": members for family, members in of_family.items() if len(members) > 1}
    for title, members in rows.items():
        loss = {
            name: [float(np.mean([seed[name]["languages"][code] for code in members])) for seed in seeds]
            for name in ("dense", *names)
        }
        cells = [told(np.subtract(loss[name], loss["dense"]).tolist(), "+.3f") for name in names]
        title = language_name(members[0]) if len(members) == 1 else title
        lines.append(f"| {title} | {np.mean(loss['dense']):.3f} | {' | '.join(cells)} |")
    return lines


def of_layers(seeds: list[dict[str, Any]]) -> list[str]:
    """Divergence between languages by layer, and its spread."""
    heads = " | ".join(f"layer {layer}" for layer in range(LAYERS))
    lines = [f"| divergence between languages | {heads} | spread |", "|---|" + "---|" * (LAYERS + 1)]
    for name in (UNTRAINED, f"plain top-k, k = 2, {ALL}", f"hybrid-k, k = 2, {ALL}"):
        rows = [seed[name] for seed in seeds]
        means = [f"{value:.3f}" for value in np.mean([row["divergence"] for row in rows], axis=0)]
        lines.append(f"| {name} | {' | '.join(means)} | {told([row['spread'] for row in rows], '+.3f')} |")
    return lines


def draw(seed: dict[str, Any], path: Path) -> None:
    """The expert shares of hybrid-k in all layers, a map for each language, with its family's expert marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots(2, 5, sharex=True, sharey=True)
    for ax, code, shares in zip(axes.flat, LANGUAGES, seed[DRAWN]["shares"], strict=True):
        own = mr.ExpertSelection({layer: [EXPERT[code]] for layer in range(LAYERS)})
        name = language_name(code)
        mr.plots.heat_map(np.array(shares), ax=ax, selected=own, limit=1.0, title=name, colorbar=False)
        ax.label_outer()
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="share of tokens")
    mr.plots.save(axes[0, 0], path)


BEGIN, END = "<!-- upcycling text: begin -->", "<!-- upcycling text: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of NTREX-128; by default, the shipped corpus is used")
    parser.add_argument("--steps", type=int, default=600, help="of the dense model, and again afterwards")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, a core each")
    parser.add_argument("--picture", type=Path, help="draw the expert shares of the first seed, hybrid-k in all layers")
    add_outputs(parser)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(one_seed, seed, options.steps, options.data) for seed in range(options.seeds)]
        seeds = [run.result() for run in runs]
    text = "the shipped corpus" if options.data is None else "NTREX-128"
    results = {"steps": options.steps, "text": text, "seeds": seeds}
    write(options, results, tables(results), BEGIN, END)
    if options.picture:
        draw(seeds[0], options.picture)


if __name__ == "__main__":
    main()
