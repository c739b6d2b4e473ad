"""Train the small target and draft language models that the server ships with.

What it promises: ``slos-serve train`` makes, from nothing but the running interpreter's own
standard library, a Llama-architecture causal language model (``target/``), a smaller one with the
same tokenizer (``draft/``) and ``MODEL_CARD.md`` with everything measured on the written weights.
Nothing is downloaded.  Both folders are in the Hugging Face layout (``config.json``,
``generation_config.json``, ``model.safetensors`` in bfloat16, ``tokenizer.json``,
``tokenizer_config.json``) and load with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

Data: the ``*.py`` files under ``sysconfig.get_paths()["stdlib"]`` in sorted order, without
installed packages, test suites, generated tables and the build configuration (which names paths
of the machine).  About one file in fourteen, chosen by a hash of its relative path, is held out of
the training of the tokenizer and of both models; every loss in the model card is measured on those.

How: a byte-level BPE tokenizer; packed sequences, documents separated by ``<|endoftext|>``; float32
training (the weights are rounded to bfloat16 once, when saved); Muon for the matrices inside the
layers and AdamW for the embedding and the norms; linear warm-up, cosine decay, gradient clipping;
a short context for most steps and the full context for the last ones.  The draft first learns
from the text alone and then also from the target's distribution over the same text.

The work is bounded by steps, not by time, so that a slower or busier machine takes longer but
does not train less.  Command: ``slos-serve train`` (``--help``; ``--scale 0.01`` is a smoke run).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<think>", "</think>")
VOCABULARY = 4096
MAX_POSITIONS = 4096
ROPE_THETA = 10000.0
HELD_OUT_ONE_IN = 14
EXCLUDED_PARTS = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"]
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
# (context in tokens, share of the steps): short first, the full context at the end.
PHASES = ((512, 0.87), (2048, 0.09), (MAX_POSITIONS, 0.04))
# Positions (tokens) between which the held-out loss is reported separately.
POSITION_RANGES = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096))
RESTART = 512  # tokens after which the control measurement starts its context afresh
LOGIT_CHUNK = 512  # token positions whose logits exist at one time
CARD_PROMPT = "def read_file(path):\n"


@dataclass(frozen=True)
class Shape:
    """Size of one model and of its training; ``batch`` is in tokens per step."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    steps: int
    batch: int


TARGET = Shape("target", 192, 6, 6, 3, 512, steps=570, batch=4096)
DRAFT = Shape("draft", 128, 2, 4, 2, 352, steps=640, batch=2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``slos-serve train``."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("model_repository/slos_llm/1"),
        help="folder that gets target/, draft/ and MODEL_CARD.md (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiply the number of steps of both models (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads used (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: %(default)s)")
    parser.add_argument(
        "--keep-target",
        action="store_true",
        help="use the target and the tokenizer already in --output, train only the draft",
    )
    parser.add_argument("--log-every", type=int, default=10, help="steps between progress lines (default: 10)")


def is_held_out(relative: str) -> bool:
    """Tell whether the file at this POSIX path below the library is kept out of training."""
    digest = hashlib.sha256(relative.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def library_files(root: Path) -> list[str]:
    """List the usable ``*.py`` files below ``root`` as sorted relative POSIX paths."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS.isdisjoint(relative.parts) and not any(
            part.startswith(EXCLUDED_PREFIXES) for part in relative.parts
        ):
            found.append(relative.as_posix())
    return sorted(found)


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Read the library: the texts to train on and the held-out texts (non-empty UTF-8 only)."""
    train: list[str] = []
    held_out: list[str] = []
    for relative in library_files(root):
        try:
            text = (root / relative).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            (held_out if is_held_out(relative) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Any:
    """Train the byte-level BPE tokenizer; ids 0, 1, 2 are the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; nothing is added when encoding."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def pack(tokenizer: Any, texts: list[str]) -> Any:
    """Encode the texts into one int64 stream, each followed by ``<|endoftext|>``."""
    import torch

    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def token_bytes(tokenizer: Any) -> Any:
    """Give the number of bytes of text each token id stands for (special tokens: 0)."""
    import torch

    sizes = [len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    for special in SPECIAL_TOKENS:
        sizes[tokenizer.token_to_id(special)] = 0
    return torch.tensor(sizes, dtype=torch.float64)


def make_model(shape: Shape) -> Any:
    """Build the untrained float32 model of this shape from torch's current seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config)
    return model


def phase_steps(steps: int) -> list[tuple[int, int]]:
    """Split ``steps`` over the phases: pairs of context (tokens) and steps, adding up exactly."""
    later = [(context, max(1, round(steps * share))) for context, share in PHASES[1:]]
    first = max(1, steps - sum(count for _, count in later))
    return [(PHASES[0][0], first), *later]


def batches(stream: Any, context: int, rows: int, seed: int) -> Iterator[Any]:
    """Yield ``rows`` x (``context`` + 1) windows forever, each epoch at another offset."""
    import torch

    rng = random.Random(seed)
    pending: list[int] = []
    while True:
        while len(pending) < rows:
            offset = rng.randrange(context)
            starts = list(range(offset, len(stream) - context - 1, context))
            rng.shuffle(starts)
            pending.extend(starts)
        picked, pending = pending[:rows], pending[rows:]
        yield torch.stack([stream[start : start + context + 1] for start in picked])


def schedule(step: int, steps: int) -> float:
    """Give the learning-rate factor (0 to 1): linear warm-up over 3 %, then cosine to 0.02."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress))


def orthogonalise(matrix: Any) -> Any:
    """Bring the singular values of a matrix near 1 by five Newton-Schulz iterations."""
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

    MUON_RATE = 0.02
    ADAM_RATE = 0.004
    MOMENTUM = 0.95
    DECAY = 0.02

    def __init__(self, model: Any) -> None:
        """Sort the parameters of ``model`` into the two groups."""
        import torch

        named = list(model.named_parameters())
        self.matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
        chosen = {id(p) for p in self.matrices}
        self.rest = [p for _, p in named if id(p) not in chosen]
        self.velocity = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(self.rest, lr=self.ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, factor: float) -> None:
        """Apply one update at ``factor`` times the peak learning rates and drop the gradients."""
        import torch

        torch.nn.utils.clip_grad_norm_([*self.matrices, *self.rest], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.ADAM_RATE * factor
        self.adam.step()
        rate = self.MUON_RATE * factor
        with torch.no_grad():
            for weight, velocity in zip(self.matrices, self.velocity, strict=True):
                velocity.lerp_(weight.grad, 1.0 - self.MOMENTUM)
                update = orthogonalise(weight.grad.lerp(velocity, self.MOMENTUM))
                stretch = math.sqrt(max(1.0, weight.size(0) / weight.size(1)))
                weight.mul_(1.0 - rate * self.DECAY).add_(update, alpha=-rate * stretch)
        for weight in [*self.matrices, *self.rest]:
            weight.grad = None


def hidden_states(model: Any, inputs: Any) -> Any:
    """Run the layers: the normalised last hidden state of every position, flattened to rows."""
    states = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def backward(model: Any, window: Any, teacher: Any, soft: float) -> float:
    """Accumulate the gradients of one window batch; return the text loss (nats per token).

    The logits are made and differentiated ``LOGIT_CHUNK`` positions at a time, which keeps them
    in the cache.  With ``soft`` > 0 that share of the loss is the cross-entropy against the
    teacher's distribution instead of the text.
    """
    import torch
    from torch.nn.functional import cross_entropy

    inputs, labels = window[:, :-1], window[:, 1:].flatten()
    states = hidden_states(model, inputs)
    with torch.no_grad():
        taught = hidden_states(teacher, inputs) if soft > 0 else None
    head = model.lm_head.weight
    total = 0.0
    gradients = []
    for start in range(0, len(labels), LOGIT_CHUNK):
        part = slice(start, start + LOGIT_CHUNK)
        leaf = states[part].detach().requires_grad_()
        logits = leaf @ head.T
        hard = cross_entropy(logits, labels[part], reduction="sum")
        loss = hard
        if taught is not None:
            with torch.no_grad():
                wanted = (taught[part] @ teacher.lm_head.weight.T).softmax(-1)
            loss = (1 - soft) * hard + soft * cross_entropy(logits, wanted, reduction="sum")
        mean: Any = loss / len(labels)
        mean.backward()
        gradients.append(leaf.grad)
        total += float(hard.detach())
    torch.autograd.backward(states, torch.cat(gradients))
    return total / len(labels)


def train_model(shape: Shape, stream: Any, teacher: Any, args: argparse.Namespace) -> tuple[Any, float, int]:
    """Train one model; return it with the wall time (seconds) and the number of tokens seen."""
    import torch

    torch.manual_seed(args.seed)
    model = make_model(shape)
    optimizer = Optimizer(model)
    plan = phase_steps(max(3, round(shape.steps * args.scale)))
    steps = sum(count for _, count in plan)
    began = time.perf_counter()
    step = tokens = 0
    average = math.log(VOCABULARY)
    for context, count in plan:
        source = batches(stream, context, max(1, shape.batch // context), args.seed + context)
        for _ in range(count):
            soft = 0.8 if teacher is not None and 2 * step >= steps else 0.0
            window = next(source)
            loss = backward(model, window, teacher, soft)
            optimizer.step(schedule(step, steps))
            step += 1
            tokens += window.size(0) * context
            average += (loss - average) * max(0.05, 1.0 / step)
            if step % args.log_every == 0 or step == steps:
                spent = time.perf_counter() - began
                print(
                    f"{shape.name} step {step}/{steps} context {context} loss {average:.3f} "
                    f"nats/token, {tokens / spent:.0f} tokens/s, {spent:.0f} s",
                    flush=True,
                )
    return model, time.perf_counter() - began, tokens


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer in the Hugging Face layout."""
    import torch

    save_tokenizer(tokenizer, folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_theta"] = ROPE_THETA  # where readers older than rope_parameters look for it
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(folder: Path) -> Any:
    """Load what was written, computing in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def held_out_windows(stream: Any, context: int, limit: int) -> Any:
    """Cut up to ``limit`` evenly spread windows of ``context`` + 1 tokens from the stream."""
    import torch

    starts = list(range(0, len(stream) - context - 1, context))
    picked = starts[:: max(1, len(starts) // limit)][:limit]
    return torch.stack([stream[start : start + context + 1] for start in picked])


def restarted(windows: Any) -> Any:
    """Cut every window of n * ``RESTART`` + 1 tokens into n, keeping the predicted tokens."""
    import torch

    length = windows.size(1) - 1
    pieces = [w[i : i + RESTART + 1] for w in windows for i in range(0, length, RESTART)]
    return torch.stack(pieces)


def losses(model: Any, windows: Any) -> Any:
    """Give the loss (nats) of every predicted position of every window."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = []
    with torch.no_grad():
        for window in windows:
            states = hidden_states(model, window[None, :-1])
            parts = [
                cross_entropy(piece @ model.lm_head.weight.T, target, reduction="none")
                for piece, target in zip(states.split(LOGIT_CHUNK), window[1:].split(LOGIT_CHUNK), strict=True)
            ]
            rows.append(torch.cat(parts))
    return torch.stack(rows).double()


def held_out_report(model: Any, windows: Any, sizes: Any) -> dict[str, float]:
    """Measure the held-out loss: nats/token, bits/byte, and nats/token by position range.

    The keys ending in ``restarted`` are the control for the long context: the same tokens, with
    the context started afresh every ``RESTART`` tokens.
    """
    values = losses(model, windows)
    control = losses(model, restarted(windows)).reshape(values.shape)
    report = {
        "nats_per_token": float(values.mean()),
        "bits_per_byte": float(values.sum() / math.log(2) / sizes[windows[:, 1:]].sum()),
    }
    for low, high in POSITION_RANGES:
        report[f"{low}-{high}"] = float(values[:, low:high].mean())
        report[f"{low}-{high} restarted"] = float(control[:, low:high].mean())
    report["restarted"] = float(control.mean())
    return report


def greedy(model: Any, prompts: Any, count: int) -> Any:
    """Continue prompts of one length by ``count`` tokens each, always the most likely token."""
    import torch

    step, cache, tokens = prompts, None, prompts
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            step = out.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, step], dim=1)
    return tokens


def acceptance_report(target: Any, draft: Any, windows: Any) -> dict[str, float]:
    """Measure how often the draft agrees with the target (shares between 0 and 1).

    ``greedy``: on greedy continuations (128 tokens) of held-out prompts (128 tokens), up to a first
    ``<|endoftext|>``; ``text``: same, on the held-out text itself; ``sampled``: the expected
    acceptance of speculative sampling at temperature 1 on that text; ``repeated``: share of the
    continuations' tokens that end an 8-gram seen before in them, i.e. how far they loop.
    """
    import torch

    prompts, count = windows[:, :128], 128
    tokens = greedy(target, prompts, count)
    made = tokens[:, prompts.size(1) :]
    live = ((made == 0).cumsum(1) - (made == 0).long()) == 0
    with torch.no_grad():
        guess = draft(input_ids=tokens[:, :-1]).logits[:, prompts.size(1) - 1 :].argmax(-1)
        text = windows[:, :256]
        ours = target(input_ids=text).logits.softmax(-1)
        theirs = draft(input_ids=text).logits.softmax(-1)
    return {
        "greedy": float((guess == made)[live].double().mean()),
        "text": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "sampled": float(torch.minimum(ours, theirs).sum(-1).double().mean()),
        "repeated": repeated_share([r[k].tolist() for r, k in zip(made, live, strict=True)]),
    }


def repeated_share(rows: list[list[int]], size: int = 8) -> float:
    """Give the share of ``size``-grams that occurred earlier in their own row."""
    seen = again = 0
    for row in rows:
        known: set[tuple[int, ...]] = set()
        for start in range(len(row) - size + 1):
            gram = tuple(row[start : start + size])
            again += gram in known
            seen += 1
            known.add(gram)
    return again / max(1, seen)


def sample(model: Any, tokenizer: Any, prompt: str, lines: int = 10) -> str:
    """Continue ``prompt`` greedily by up to 160 tokens and keep the first ``lines`` lines."""
    import torch

    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    made = greedy(model, ids, 160)[0].tolist()
    if 0 in made:
        made = made[: made.index(0)]
    return "\n".join(tokenizer.decode(made).split("\n")[:lines])


def parameter_count(model: Any) -> int:
    """Count the parameters, the tied embedding once."""
    return sum(p.numel() for p in model.parameters())


def card_row(shape: Shape, model: Any, cost: str, report: dict[str, float]) -> str:
    """Write one model's row of the card's table."""
    names = [f"{low}-{high}" for low, high in POSITION_RANGES]
    ranges = " / ".join(f"{report[name]:.3f}" for name in names)
    control = " / ".join(f"{report[f'{name} restarted']:.3f}" for name in names)
    return (
        f"| {shape.name} | {parameter_count(model):,} | {shape.hidden} / {shape.layers} / "
        f"{shape.heads} / {shape.kv_heads} / {shape.intermediate} | {cost} | "
        f"{report['nats_per_token']:.3f} | {report['bits_per_byte']:.3f} | {ranges} | "
        f"{control} |"
    )


def model_card(rows: list[str], agreement: dict[str, float], text: str, facts: str) -> str:
    """Write the model card from the measurements."""
    return f"""# Model card: slos_llm version 1

Two Llama-architecture causal language models with one tokenizer (byte-level BPE, {VOCABULARY}
entries; `<|endoftext|>` id 0 is bos, eos and pad; `<think>` id 1 and `</think>` id 2 are reserved
and never occur in the training text). Tied embeddings, up to {MAX_POSITIONS} positions,
rope_theta {ROPE_THETA:.0f}, weights in bfloat16. They write plausible-looking Python and nothing
more: they are there to exercise and measure the server, not to be useful assistants.

Made by `slos-serve train`. {facts}

| model | parameters | hidden / layers / heads / KV heads / MLP | training | held-out nats/token | bits/byte | nats/token at positions {" / ".join(f"{low}-{high}" for low, high in POSITION_RANGES)} | same tokens, context restarted every {RESTART} |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Held-out losses are those of the bfloat16 weights as shipped, computed in float32, over
{MAX_POSITIONS}-token windows of packed held-out files. The last column predicts the same tokens
without the long context: where the full-context loss is above it, the model is hurt by its own
long context. Training seconds are wall time and include waiting for whatever else ran.

Agreement of the draft with the target, held-out prompts of 128 tokens, so positions up to 256 only:

- greedy acceptance, on the target's greedy continuations of 128 tokens: {agreement["greedy"]:.3f}
- same argmax on the held-out text itself: {agreement["text"]:.3f}
- expected acceptance of speculative sampling at temperature 1 on that text: {agreement["sampled"]:.3f}
- share of repeated 8-grams in the greedy continuations: {agreement["repeated"]:.3f}. Small models
  loop when decoded greedily and loops are easy to draft, so read the first figure with this one.

Greedy sample of the target:

```python
{text}
```

Licence: the weights are trained on the CPython standard library, which is under the PSF licence,
taken from the interpreter on the training machine (version above).
"""  # noqa: E501


def run(args: argparse.Namespace) -> int:
    """Train, save, measure what was saved, write the card; return the exit status."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, held_texts = read_corpus(root)
    if not texts or not held_texts:
        print("the interpreter has no standard library sources to train on", file=sys.stderr)
        return 1
    output: Path = args.output
    if args.keep_target:
        tokenizer = Tokenizer.from_file(str(output / "target" / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts)
    stream, held_stream = pack(tokenizer, texts), pack(tokenizer, held_texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(
        f"{len(texts)} files, {size} bytes, {len(stream)} tokens to train on; "
        f"{len(held_texts)} files, {len(held_stream)} tokens held out",
        flush=True,
    )
    costs = {}
    teacher = None
    for shape in (TARGET, DRAFT):
        if shape is TARGET and args.keep_target:
            costs["target"] = "kept"
        else:
            model, seconds, tokens = train_model(shape, stream, teacher, args)
            costs[shape.name] = f"{tokens:,} tokens, {seconds:.0f} s"
            save_model(model, tokenizer, output / shape.name)
        if shape is TARGET:
            teacher = load_model(output / "target")
    draft = load_model(output / "draft")
    sizes = token_bytes(tokenizer)
    windows = held_out_windows(held_stream, MAX_POSITIONS, 16)
    rows = []
    for shape, model in ((TARGET, teacher), (DRAFT, draft)):
        report = held_out_report(model, windows, sizes)
        print(shape.name, json.dumps(report), flush=True)
        rows.append(card_row(shape, model, costs[shape.name], report))
    agreement = acceptance_report(teacher, draft, held_out_windows(held_stream, 512, 48))
    print("agreement", json.dumps(agreement), flush=True)
    facts = (
        f"Training data: the standard library of CPython {platform.python_version()} without tests "
        f"and generated tables: {len(texts)} files, {size / 1e6:.1f} MB, {len(stream):,} tokens; "
        f"held out by a hash of the path: {len(held_texts)} files, {len(held_stream):,} tokens. "
        f"PyTorch {torch.__version__}, {args.threads} CPU threads, float32, seed {args.seed}, "
        f"scale {args.scale:g}."
    )
    card = model_card(rows, agreement, sample(teacher, tokenizer, CARD_PROMPT), facts)
    (output / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return 0


def main() -> int:
    """Run as ``python backend/train.py`` without the rest of the command line."""
    parser = argparse.ArgumentParser(description="train the target and draft models")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
