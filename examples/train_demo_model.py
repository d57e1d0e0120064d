"""Train the demonstration model of moe-route: a small multilingual Mixture-of-Experts language model, from scratch.

    python examples/train_demo_model.py --data DATA/tatoeba --out OUT

DATA/tatoeba holds the Tatoeba Challenge test sets, one file a language (eng-rus.tsv, eng-deu.tsv, ...), one pair a
line, English<TAB>other. The model is a Qwen3-MoE: 8 sparse layers, 16 experts of which 2 are selected, about 3.3
million parameters. It learns from sentences of ten languages, from pairs of translations ("English = other") and from
arithmetic problems (arithmetic_problems.py, mostly English), so that it has what studies of multilingual routing look
at: shared and language-specific layers, and experts for a task.

It takes half an hour to an hour on two CPU cores. OUT receives the model in bfloat16, the tokenizer and training.json
with the held-out loss of every language; OUT/checkpoint is written every --save-every steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arithmetic_problems import LANGUAGES, render, sample_problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm, trange
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

# FLORES code -> the code in the Tatoeba file name, from the most to the fewest sentences.
TATOEBA = {
    "rus_Cyrl": "rus",
    "deu_Latn": "deu",
    "fra_Latn": "fra",
    "jpn_Jpan": "jpn",
    "zho_Hans": "zho",
    "arb_Arab": "ara",
    "hin_Deva": "hin",
    "ind_Latn": "ind",
    "swh_Latn": "swa",
}
# Swahili has 387 pairs only: each is seen this many times as often, and it stays the lowest-resource language by far.
REPEATS = {"swh_Latn": 4}
HELD_OUT_PERCENT = 4
ENGLISH_PROBLEMS, OTHER_PROBLEMS = 9000, 900
MAX_HELD_OUT = 400

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = 4096
WINDOW = 128


@dataclass
class Text:
    """Documents: single sentences and problems as (language, text), translations as (language, English, other)."""

    sentences: list[tuple[str, str]]
    pairs: list[tuple[str, str, str]]


def is_held_out(english: str) -> bool:
    """Held out by the English sentence, so that a sentence is on the same side in every language."""
    return int.from_bytes(hashlib.sha256(english.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def read_pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    pairs = {}
    for language, code in TATOEBA.items():
        path = folder / f"eng-{code}.tsv"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --data must name the folder with the eng-*.tsv files of Tatoeba")
        rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
        pairs[language] = [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2]
    return pairs


def split(pairs: dict[str, list[tuple[str, str]]], seed: int) -> tuple[Text, dict[str, list[str]]]:
    """The training text, and the held-out sentences by language: none of these, of either side, is left in the text."""
    held: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for language, rows in pairs.items():
        for english, other in rows:
            if is_held_out(english):
                held["eng_Latn"].append(english)
                held[language].append(other)
    unseen = {sentence for sentences in held.values() for sentence in sentences}
    train = Text([], [])
    english_sentences = set()
    for language, rows in pairs.items():
        kept = [(e, o) for e, o in rows if e not in unseen and o not in unseen] * REPEATS.get(language, 1)
        english_sentences.update(english for english, _ in kept)
        train.sentences += [(language, other) for _, other in kept]
        train.pairs += [(language, english, other) for english, other in kept]
    train.sentences += [("eng_Latn", english) for english in sorted(english_sentences)]
    for index, language in enumerate(LANGUAGES):
        count = ENGLISH_PROBLEMS if language == "eng_Latn" else OTHER_PROBLEMS
        for i, problem in enumerate(sample_problems(count, seed=1000 * seed + index, held_out=False)):
            train.sentences.append((language, render(problem, language, digits=i % 3 == 2)))
    rng = random.Random(seed)
    for sentences in held.values():
        sentences[:] = sorted(set(sentences))
        rng.shuffle(sentences)
        del sentences[MAX_HELD_OUT:]
    return train, held


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE. Letters stay with their combining marks (Devanagari, Arabic), digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


class Stream:
    """Training windows. An epoch is every sentence and every pair once, the pairs in a random direction, end to end."""

    def __init__(self, text: Text, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sentences = tokenizer.encode_batch([sentence for _, sentence in text.sentences])
        self.forward = tokenizer.encode_batch([f"{english} = {other}" for _, english, other in text.pairs])
        self.backward = tokenizer.encode_batch([f"{other} = {english}" for _, english, other in text.pairs])
        self.eos = tokenizer.token_to_id(EOS)
        self.buffer = np.empty(0, dtype=np.int64)
        self.epochs = 0

    def _epoch(self) -> np.ndarray:
        documents = [*self.sentences, *map(self.rng.choice, zip(self.forward, self.backward, strict=True))]
        self.rng.shuffle(documents)
        self.epochs += 1
        return np.concatenate([np.array([*document.ids, self.eos], dtype=np.int64) for document in documents])

    def batch(self, size: int) -> torch.Tensor:
        """Token ids ``[size, WINDOW]``, int64."""
        need = size * WINDOW
        while len(self.buffer) < need:
            self.buffer = np.concatenate([self.buffer, self._epoch()])
        taken, self.buffer = self.buffer[:need], self.buffer[need:]
        return torch.from_numpy(taken.copy()).view(size, WINDOW)


def build_model(tokenizer: Tokenizer) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    # The fastest on a CPU: 5600 tokens a second on two Zen 4 cores, "eager" 3800, both in float32.
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / 100)
    return peak * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: Qwen3MoeForCausalLM, stream: Stream, args: argparse.Namespace, save: Callable[[Path], None]) -> None:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    bf16 = args.device.startswith("cuda")
    model.train()
    bar = trange(args.steps, desc="training", unit=" steps", disable=not sys.stderr.isatty())
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        ids = stream.batch(args.batch).to(args.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            output = model(input_ids=ids, labels=ids, output_router_logits=True)
        output.loss.backward()  # the balancing loss of the routers is part of it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0:
            balance = float(output.aux_loss.detach())
            loss = float(output.loss.detach()) - model.config.router_aux_loss_coef * balance
            bar.set_postfix(loss=f"{loss:.3f}", balance=f"{balance:.3f}")
        if (step + 1) % args.save_every == 0:
            save(args.out / "checkpoint")
            model.train()


@torch.no_grad()
def held_out_loss(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, sentences: list[str], device: str
) -> dict[str, float]:
    """Mean loss of sentences read one by one, their end token included: nats a token, and bits a byte of UTF-8."""
    model.eval()
    eos = tokenizer.token_to_id(EOS)
    nats, tokens, size = 0.0, 0, 0
    for sentence in sentences:
        ids = torch.tensor([[*tokenizer.encode(sentence).ids, eos]], device=device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
        size += len(sentence.encode())
    return {
        "sentences": len(sentences),
        "tokens": tokens,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def save_checkpoint(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """The model in bfloat16 (the one in training stays as it is) and a tokenizer that AutoTokenizer loads."""
    copy = build_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    # transformers 5 renamed two things that version 4 still asks for; both versions read what is written here.
    _rewrite(folder / "config.json", num_experts=model.config.num_experts)
    _rewrite(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _rewrite(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the eng-*.tsv files of Tatoeba")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the tokenizer and training.json")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32, help=f"windows of {WINDOW} tokens a step (default 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not sys.stderr.isatty():
        disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    text, held = split(read_pairs(args.data), args.seed)
    documents = Counter(language for language, _ in text.sentences)
    print("documents besides the pairs:", dict(documents), "pairs:", len(text.pairs), flush=True)
    tokenizer = train_tokenizer([sentence for _, sentence in text.sentences])
    stream = Stream(text, tokenizer, args.seed)
    model = build_model(tokenizer).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {args.steps} steps of {args.batch * WINDOW} tokens", flush=True)

    started = time.monotonic()
    train(model, stream, args, save=lambda folder: save_checkpoint(model, tokenizer, folder))
    minutes = (time.monotonic() - started) / 60
    save_checkpoint(model, tokenizer, args.out)

    # Judged as it is shipped: rounded to bfloat16.
    shipped = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    languages = tqdm(LANGUAGES, desc="held-out sentences", disable=not sys.stderr.isatty())
    losses = {language: held_out_loss(shipped, tokenizer, held[language], args.device) for language in languages}
    problems = list(sample_problems(100, seed=args.seed + 99, held_out=True))
    task = {}
    for language in LANGUAGES:
        task[language] = held_out_loss(shipped, tokenizer, [render(p, language) for p in problems], args.device)
        general, arithmetic = losses[language], task[language]
        print(
            f"{language}  {general['nats_per_token']:.3f} nats/token, {general['bits_per_byte']:.3f} bits/byte;", end=""
        )
        print(f"  arithmetic {arithmetic['nats_per_token']:.3f}, {arithmetic['bits_per_byte']:.3f}")
    report = {
        "parameters": parameters,
        "steps": args.steps,
        "tokens": args.steps * args.batch * WINDOW,
        "epochs": stream.epochs,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "batch_windows": args.batch,
        "window_tokens": WINDOW,
        "minutes": round(minutes, 1),
        "device": args.device,
        "training_pairs": dict(Counter(language for language, _, _ in text.pairs)),
        "training_documents": dict(documents),
        "held_out": losses,
        "held_out_arithmetic": task,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
