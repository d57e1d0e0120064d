"""Train the demonstration model of moe-route: a small multilingual Mixture-of-Experts language model, from scratch.

    python examples/demo_model/train.py --data DATA/tatoeba --out OUT --seed 0
    python examples/demo_model/train.py --data DATA/tatoeba --out LONGER --seed 0 --from OUT

DATA/tatoeba holds the Tatoeba Challenge test sets, one file per language (eng-rus.tsv, eng-deu.tsv, ...), one pair per
line, English<TAB>other. The model is a Qwen3-MoE of 5.3 million parameters: 8 sparse layers, 16 experts, top-2. It
learns from sentences of ten languages, translations, sentences with words of two languages, digit problems
(problems.py), whose pairs of numbers English has seen most of and the other languages less, and lines that copy a
number or count on (controls.py).

The balance of the experts is asked of every layer by itself; `load_balancing_loss_func` of transformers adds up the
layers first, so that single layers may collapse (issue 28255 of transformers).

OUT receives the model in bfloat16, the tokenizer, held_out.json and training.json; judge.py judges them. With `--from`,
training goes on from the weights of an earlier run: a new optimizer, a new schedule, other documents, the low balance
coefficient from the start. training.json then counts both runs and lists them under "runs".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text import ANSWER_WEIGHT, BOS, EOS, PAD, WINDOW, Documents, Windows, add_bos, read, train_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from moe_route.data import demo_corpus

TOP_K = 2
VOCABULARY = 6144
SWITCHES = 40000  # sentences with words of two languages, made in advance
BALANCE = (0.01, 0.002)  # coefficient before and after 60 % of the run, so that experts may specialize late
Z_LOSS = 1e-3


def build(tokenizer: Tokenizer) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=80,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


class Loss(torch.nn.Module):
    """Cross-entropy of a batch with the balance and z-losses of its routers, in one graph that compiles."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        super().__init__()
        self.model = model
        causal = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean loss, balance loss, z-loss, and nats of every token but the first of a window, [B * (WINDOW - 1)]."""
        mask = ((parts[:, :, None] == parts[:, None, :]) & self.causal)[:, None]
        output = self.model.model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        states = output.last_hidden_state[:, :-1].flatten(0, 1)
        logits = states @ self.model.lm_head.weight.T
        nats = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        balance, z = router_losses(output.router_logits, parts.flatten() > 0)
        return (nats * weight).sum() / weight.sum(), balance, z, nats.detach()


def router_losses(layers: tuple[torch.Tensor, ...], valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance loss (arXiv 2101.03961, eq. 4) and z-loss (arXiv 2202.08906, eq. 5) of each layer, mean over layers.

    layers: router logits [T, E] of each layer. valid: bool [T], False for padding.
    """
    one = valid.float()[:, None]
    tokens = one.sum()
    balance = z = torch.zeros(())
    for logits in layers:
        scores = logits.softmax(-1)
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(TOP_K, -1).indices, 1.0)
        balance = balance + scores.shape[1] * ((chosen * one).sum(0) / tokens * ((scores * one).sum(0) / tokens)).sum()
        z = z + (logits.logsumexp(-1).square() * one[:, 0]).sum() / tokens
    return balance / len(layers), z / len(layers)


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to a twentieth of the peak."""
    return peak * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, folder: Path, report: dict[str, Any]) -> None:
    """The model in bfloat16, a tokenizer that AutoTokenizer loads, and training.json."""
    copy = build(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    framed = Tokenizer.from_str(tokenizer.to_str())
    add_bos(framed)
    PreTrainedTokenizerFast(
        tokenizer_object=framed, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        model_max_length=model.config.max_position_embeddings, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    # transformers 5 renamed two things that version 4 still asks for; both versions read what is written here.
    _rewrite(folder / "config.json", num_experts=model.config.num_experts)
    _rewrite(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _write(folder / "training.json", report)


def _rewrite(path: Path, **values: object) -> None:
    _write(path, json.loads(path.read_text(encoding="utf-8")) | values)


def _write(path: Path, content: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_earlier(folder: Path, model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Load the weights of an earlier run into `model`, and return its training.json.

    Raises ValueError if that run had another seed (and so another order of the shares) or another tokenizer.
    """
    report: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if report["seed"] != seed:
        raise ValueError(f"{folder} was trained with --seed {report['seed']}, not {seed}")
    vocabulary = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(f"{folder} has another tokenizer: train from the --data that it was trained from")
    model.load_state_dict(Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    run = {"steps": report["steps"], "tokens": report["tokens"], "minutes": report["minutes"]}
    report.setdefault("runs", [run | {"learning_rate": report["learning_rate"]}])
    return report


def train(
    model: Qwen3MoeForCausalLM,
    windows: Windows,
    args: argparse.Namespace,
    report: dict[str, Any],
    checkpoint: Callable[[], None],
) -> None:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    module = Loss(model)
    compute = torch.compile(module, dynamic=False) if args.compile else module
    sums: dict[str, float] = defaultdict(float)
    began = saved = time.monotonic()
    earlier = {key: sum(run[key] for run in report["runs"]) for key in ("steps", "tokens", "minutes")}
    late = bool(report["runs"])  # the experts have specialized already
    step = tokens = 0

    def count(progress: float) -> None:
        minutes = round((time.monotonic() - began) / 60, 1)
        run = {"steps": step, "tokens": tokens, "minutes": minutes}
        report.update({key: round(earlier[key] + value, 1) for key, value in run.items()}, progress=round(progress, 3))
        current.update(run)

    current = {"learning_rate": args.learning_rate} | ({"balance": args.balance} if args.balance else {})
    report["runs"].append(current)
    while (progress := max(step / args.steps, (time.monotonic() - began) / 60 / args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args.learning_rate)
        ids, weights, parts = (x.to(args.device) for x in windows.batch(args.batch))
        loss, balance, z, nats = compute(ids, weights, parts)
        coefficient = args.balance or BALANCE[late or progress >= 0.6]
        (loss + coefficient * balance + Z_LOSS * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += int((parts > 0).sum())
        weight = weights[:, 1:].flatten()
        rows = {
            "text": nats[weight == 1].mean(),
            "answer": nats[weight == ANSWER_WEIGHT].mean(),
            "balance": balance,
            "z": z,
        }
        for name, value in rows.items():
            sums[name] += float(value.detach())
        if step % 50 == 0:
            seconds = time.monotonic() - began
            row = {name: round(value / 50, 4) for name, value in sums.items()}
            so_far = {"step": earlier["steps"] + step, "tokens": earlier["tokens"] + tokens}
            report["log"].append(row | so_far | {"seconds": round(earlier["minutes"] * 60 + seconds)})
            sums.clear()
            print(report["log"][-1], f"{tokens / seconds:.0f} tokens/s", flush=True)
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            count(progress)
            checkpoint()
    count(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the eng-*.tsv files of Tatoeba")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the tokenizer and training.json")
    parser.add_argument("--from", dest="earlier", type=Path, help="go on from what an earlier run wrote to its --out")
    parser.add_argument("--steps", type=int, default=2000, help=f"of --batch windows of {WINDOW} tokens (default 2000)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="the schedule ends here if --steps takes longer"
    )
    parser.add_argument("--batch", type=int, default=32, help="windows per step (default 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--balance", type=float, help=f"coefficient of the balance loss (default {BALANCE[0]}, late {BALANCE[1]})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="an odd seed uses the second order of shares of the problems"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="run eagerly: no waiting, but 1.4 times slower"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)

    shipped = demo_corpus()
    sentence_pairs, held = read(args.data, (text for language in shipped.languages for text in shipped[language]))
    sentences = sorted({s for found in sentence_pairs.values() for pair in found for s in pair})
    tokenizer = train_tokenizer(sentences, VOCABULARY)
    _write(args.out / "held_out.json", held)
    model = build(tokenizer)
    report: dict[str, Any] = {"runs": [], "log": []}
    if args.earlier is not None:
        report = read_earlier(args.earlier, model, tokenizer, args.seed)
    model.to(args.device).train()
    documents = Documents(tokenizer, sentence_pairs, args.seed % 2, SWITCHES, args.seed + 1000 * len(report["runs"]))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; lexicon {documents.lexicon_sizes}", flush=True)

    report |= {
        "parameters": parameters, "seed": args.seed, "order": args.seed % 2, "batch_windows": args.batch,
        "window_tokens": WINDOW, "learning_rate": args.learning_rate, "device": args.device,
        "training_pairs": {language: len(found) for language, found in sentence_pairs.items()},
    }  # fmt: skip
    windows = Windows(documents, tokenizer.token_to_id(PAD))
    train(model, windows, args, report, lambda: save(model, tokenizer, args.out, report))
    report["documents"] = dict(sorted((documents.count + Counter(report.get("documents", {}))).items()))
    save(model, tokenizer, args.out, report)
    print("done:", report["steps"], "steps,", report["tokens"], "tokens")


if __name__ == "__main__":
    main()
