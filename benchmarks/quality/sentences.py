"""SST-2: its data, and a small encoder that classifies sentences."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sop.zoo import DataError
from lightning_sop.zoo.loading import SplitDataModule
from lightning_sop.zoo.nets import encoder_layers
from lightning_sop.zoo.optimizers import adamw_cosine

PADDING, UNKNOWN = 0, 1
Row = tuple[list[str], int]


class Encoded(Dataset[tuple[Tensor, Tensor]]):
    """Token numbers (n, context), padded, with labels."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.tokens[indices], self.labels[indices]


class Sst2(SplitDataModule):
    """Sentences and phrases of movie reviews with their sentiment; GLUE's development set is the test.

    The training set has phrases of its own sentences. Held out are long ones; whatever has four words in a row in common
    with them is not trained on.

    Args:
        root: folder with ``sst2_train.tsv.gz`` and ``sst2_dev.tsv.gz``.
        vocabulary: most frequent words of the training set that are told apart, with padding and the unknown word.
        context: words of a sentence that are read.
        batch_size: sentences per batch.
        val_size: sentences held out.
        seed: of that choice.
        first: how many of the others are trained on; default all.
    """

    overlap = 4
    long = 10

    def __init__(
        self,
        root: str | Path,
        vocabulary: int = 10_000,
        context: int = 48,
        batch_size: int = 64,
        val_size: int = 2000,
        seed: int = 0,
        first: int | None = None,
    ) -> None:
        super().__init__()
        self.first = first
        self.root, self.vocabulary, self.context = Path(root), vocabulary, context
        self.batch_size, self.val_size, self.seed, self.num_workers = batch_size, val_size, seed, 0
        self._splits: dict[str, Encoded] = {}

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        rows, test = read_rows(self.root / "sst2_train.tsv.gz"), read_rows(self.root / "sst2_dev.tsv.gz")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = [number for number in order if len(rows[number][0]) >= self.long][: self.val_size]
        if len(held_out) < self.val_size:
            raise DataError(f"val_size={self.val_size}: there are {len(held_out)} sentences of {self.long} words")
        val = [rows[number] for number in held_out]
        seen = {part for words, _ in val for part in runs_of(words, self.overlap)}
        out = set(held_out)
        train = [
            row
            for number, row in enumerate(rows)
            if number not in out and not any(part in seen for part in runs_of(row[0], self.overlap))
        ]
        if self.first is not None:
            if not 0 < self.first <= len(train):
                raise DataError(f"first={self.first}: there are {len(train)} sentences besides those held out")
            train = train[: self.first]
        words = Counter(word for row, _ in train for word in row).most_common(self.vocabulary - 2)
        numbers = {word: number for number, (word, _) in enumerate(words, start=2)}
        for split, part in (("train", train), ("val", val), ("test", test)):
            self._splits[split] = encoded(part, numbers, self.context)


def read_rows(path: Path) -> list[Row]:
    """Words and label of each row below the header."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").rstrip("\n").split("\n")[1:]
        pairs = [line.split("\t") for line in lines]
        return [(sentence.lower().split(), int(label)) for sentence, label in pairs if sentence.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: no readable table of sentences and labels ({error})") from error


def runs_of(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    """All runs of so many words; a shorter sentence has none."""
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def encoded(rows: Sequence[Row], numbers: dict[str, int], context: int) -> Encoded:
    """Rows as numbers, cut or padded to one length."""
    tokens = torch.full((len(rows), context), PADDING)
    for place, (words, _) in enumerate(rows):
        found = [numbers.get(word, UNKNOWN) for word in words[:context]]
        tokens[place, : len(found)] = torch.tensor(found)
    return Encoded(tokens, torch.tensor([label for _, label in rows]))


class Encoder(nn.Module):
    """Transformer encoder: logits from the mean of its features over a sentence's words."""

    def __init__(
        self, vocabulary: int, context: int, num_classes: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.positions = nn.Embedding(context, width)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = encoder_layers(depth, width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        absent = tokens == PADDING
        features = self.dropout(self.embedding(tokens) + self.positions.weight[: tokens.shape[1]])
        for layer in self.layers:
            features = layer(features, src_key_padding_mask=absent)
        present = (~absent).unsqueeze(2).to(features)
        logits: Tensor = self.head((self.norm(features) * present).sum(1) / present.sum(1))
        return logits


class SentenceClassifier(LightningModule):
    """Classifier of sentences; logs loss and accuracy as the zoo's image classifier does."""

    def __init__(
        self,
        vocabulary: int = 10_000,
        context: int = 48,
        num_classes: int = 2,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.net = Encoder(vocabulary, context, num_classes, width, depth, heads, dropout)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def configure_optimizers(self) -> Any:
        return adamw_cosine(self, self.lr, self.weight_decay)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        logits = self(batch[0])
        accuracy.update(logits, batch[1])
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]))
        self.log(f"{stage}_acc", accuracy)
