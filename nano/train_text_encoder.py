"""Train nano's text encoder to hold in its last token what a prompt says of the scene; write it with its tokenizer.

python as_package.py nano.train_text_encoder
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..model_loader.config import TextEncoderConfig
from ..model_loader.load import save_part
from ..model_loader.text_encoder import TextEncoder
from . import world
from .prompts import corpus, words
from .training import WEIGHTS, train

CONFIG = TextEncoderConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    query_pre_attn_scalar=24,
    sliding_window=4096,
    attention_softcap=None,
    rope_theta=10000.0,
    norm_eps=1e-6,
)
SPOKEN = 5  # syllables that have an answer of their own
END = "<eos>"


def train_tokenizer(prompts):
    """Return a byte-level BPE tokenizer that can write any text and ends it with <eos>; ids below 512."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<pad>", END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def answers(scene):
    """Return what a reader of the prompt should know: kind, colour, ground, bounces, five syllables (class numbers)."""
    colours = list(world.COLOURS)
    spoken = [1 + world.SYLLABLES.index(s) for s in scene.syllables[:SPOKEN]]
    return [
        world.KINDS.index(scene.kind),
        colours.index(scene.colour),
        colours.index(scene.background),
        4 if scene.kind == "face" else scene.bounces or 0,
        *spoken,
        *[0] * (SPOKEN - len(spoken)),
    ]


CLASSES = (len(world.KINDS), len(world.COLOURS), len(world.COLOURS), 5, *[len(world.SYLLABLES) + 1] * SPOKEN)


def corrupt(ids, rng):
    """Replace a token in twenty by a random one, the end apart, so that unknown words do not upset the encoder."""
    noisy = ids.copy()
    hit = rng.random(ids.shape) < 0.05
    hit[:, -1] = False
    noisy[hit] = rng.integers(2, CONFIG.vocab_size, hit.sum())
    return noisy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--prompts", type=int, default=40000)
    options = parser.parse_args()
    pairs = corpus(options.prompts)
    tokenizer = train_tokenizer([prompt for _, prompt in pairs])
    buckets = defaultdict(list)
    for (scene, _), coded in zip(pairs, tokenizer.encode_batch([p for _, p in pairs]), strict=True):
        buckets[len(coded.ids)].append((coded.ids, answers(scene)))
    lengths = sorted(n for n in buckets if len(buckets[n]) >= 64)
    shares = np.array([len(buckets[n]) for n in lengths], float)
    arrays = {n: tuple(np.array(column) for column in zip(*buckets[n], strict=True)) for n in lengths}

    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.1)
    module = torch.nn.ModuleDict({"encoder": encoder, "heads": torch.nn.Linear(CONFIG.hidden_size, sum(CLASSES))})

    def loss_of_step(step):
        rng = np.random.default_rng((32, step))
        ids, truth = arrays[rng.choice(lengths, p=shares / shares.sum())]
        rows = rng.integers(0, len(ids), 64)
        features = module["encoder"](torch.from_numpy(corrupt(ids[rows], rng)))
        logits = module["heads"](features[:, -1]).split(CLASSES, dim=1)
        target = torch.from_numpy(truth[rows])
        losses = [F.cross_entropy(part, target[:, i]) for i, part in enumerate(logits)]
        right = [(part.argmax(1) == target[:, i]).float().mean().item() for i, part in enumerate(logits)]
        # an unsaid ground cannot be known: its share of the loss stays, and does no harm
        return sum(losses), {
            "kind": right[0],
            "colour": right[1],
            "ground": right[2],
            "bounces": right[3],
            "syllables": sum(right[4:]) / SPOKEN,
        }

    average = train("text_encoder", module, loss_of_step, steps=options.steps, peak_rate=1e-3)
    print(
        {
            "tokens": [lengths[0], lengths[-1]],
            "features_std": average["encoder"](torch.from_numpy(arrays[lengths[0]][0][:64])).std().item(),
        }
    )
    (WEIGHTS / "nano_words.txt").write_text("\n".join(words(prompt for _, prompt in pairs)) + "\n", encoding="utf-8")
    save_part(
        WEIGHTS / "nano_text_encoder.safetensors",
        average["encoder"].to(torch.bfloat16),
        "text_encoder",
        CONFIG,
        "nano",
        tokenizer=tokenizer.to_str(),
    )


if __name__ == "__main__":
    main()
