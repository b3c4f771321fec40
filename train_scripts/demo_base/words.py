"""Make the tokenizer of the embedded base: byte-pair encoding (arXiv 1508.07909) in the layout of CLIP's.

    python train_scripts/demo_base/words.py DATA --pipeline imgadapt/demo/pipeline

The vocabulary is 256 bytes, the same at a word's end, the merges in order of their learning, start and end of text:
2,208 tokens where CLIP has 49,408. Merges are learned here and not by `tokenizers`, whose trainer breaks ties
differently in each run: an encoder needs the very files that it was trained with. Half a minute on one core.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from imgadapt.demo import emoji

LENGTH = 20  # tokens of a caption, start and end included
END = "</w>"  # marks the last symbol of a word
EXTRA = [  # what people who adapt the base may want to say
    "sks", "style", "in the style of", "photo", "painting", "icon", "flat", "outline", "line art",
    "black and white", "pixel art", "small", "big", "two", "three", "red", "green", "blue",
]  # fmt: skip


def count_words(concepts: list[emoji.Concept]) -> Counter[str]:
    """How often each word is weighed: by how likely a caption has it."""
    phrases = Counter[str]()
    for concept in concepts:
        phrases[concept["label"]] += 63 if concept["concrete"] else 3
        phrases.update(concept["tags"])
    for template in emoji.TEMPLATES:
        phrases[template.format("")] += 200
    for background in emoji.BACKGROUNDS:
        phrases[f"on a {background} background"] += 200
    for phrase in EXTRA:
        phrases[phrase] += 20
    words = Counter[str]()
    for phrase, count in phrases.items():
        for word in phrase.split():
            words[word] += count
    return words


def learn_merges(words: Counter[str], alphabet: list[str], count: int) -> list[tuple[str, str]]:
    """The `count` pairs to join, most frequent first; ties go to the symbols that are older, then lower in value."""
    order = {symbol: i for i, symbol in enumerate(alphabet)}
    split = {word: (*word[:-1], word[-1] + END) for word in words}
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter[tuple[str, str]]()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        merges.append(best)
        order.setdefault("".join(best), len(order))
        split = {word: join(symbols, best) for word, symbols in split.items()}
    return merges


def join(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The symbols with every occurrence of the pair, from the left, made one."""
    if pair not in pairwise(symbols):
        return symbols
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        width = 2 if symbols[i : i + 2] == pair else 1
        joined.append("".join(symbols[i : i + width]))
        i += width
    return tuple(joined)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pipeline", type=Path, required=True, help="tokenizer/ is written there")
    parser.add_argument("--merges", type=int, default=1694)
    args = parser.parse_args()
    concepts = emoji.concepts(args.data)
    words = count_words(concepts)
    letters = sorted(ByteLevel.alphabet())
    alphabet = letters + [letter + END for letter in letters]
    merges = learn_merges(words, alphabet, args.merges)

    symbols = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    folder = args.pipeline / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)

    labels = [concept["label"] for concept in concepts if concept["core"]]
    cut = {word for label in labels for word in label.split() if len(tokenizer.tokenize(word)) > 1}
    captions = [f"{template.format(label)} on a yellow background" for template in emoji.TEMPLATES for label in labels]
    lengths = {caption: len(tokenizer(caption).input_ids) for caption in captions}
    longest = max(lengths, key=lambda caption: lengths[caption])
    print(f"{len(tokenizer)} tokens for {len(words)} words; words of core labels that take several: {len(cut)}")
    print(f"longest caption: {lengths[longest]} of {LENGTH} tokens, {longest!r}")
    return 0 if lengths[longest] <= LENGTH else 1


if __name__ == "__main__":
    sys.exit(main())
