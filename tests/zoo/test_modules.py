"""The LightningModules: metrics against scikit-learn's, the built-in schedule, plain checkpoints."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.metrics import accuracy_score, log_loss

from lightning_sop.zoo import Digits, ImageClassifier, LanguageModel, PythonSource


def make_trainer(folder, **settings):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**defaults, "enable_checkpointing": False, **settings})


@pytest.mark.parametrize("net", ["mlp", "resnet", "vit"])
def test_test_metrics_are_those_of_scikit_learn(net, tmp_path):
    model, data = ImageClassifier(net, width=8, depth=1), Digits(batch_size=50)  # the last batch is smaller
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.test(model, data, verbose=False)
    probabilities = torch.cat(trainer.predict(model, data)).double()
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert metrics["test_acc"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)), abs=1e-6)
    normalized = probabilities / probabilities.sum(1, keepdim=True)
    assert metrics["test_loss"] == pytest.approx(log_loss(labels, normalized, labels=range(10)), rel=1e-5)


def test_digits_are_learned(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, max_epochs=5)
    trainer.fit(ImageClassifier(lr=5e-3), Digits())
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert trainer.callback_metrics["train_loss"] < 0.5


def test_source_text_is_learned_beyond_its_byte_frequencies(tmp_path):
    torch.manual_seed(0)
    data = PythonSource(context=64, batch_size=16, max_bytes=200_000)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=120)
    trainer.fit(LanguageModel(context=64, width=64, depth=1, heads=4, lr=5e-3), data)
    text = data.val_dataloader().dataset.text
    frequency = torch.bincount(text.long(), minlength=256).double() / len(text)
    unigram = -(frequency[frequency > 0] * frequency[frequency > 0].log()).sum()
    assert trainer.callback_metrics["val_loss"] < unigram
    # batches are of one size here but for the last, so the mean loss is nearly that of all tokens
    perplexity = trainer.callback_metrics["val_perplexity"].item()
    assert math.log(perplexity) == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-3)


def test_learning_rate_is_half_a_cosine_over_the_whole_fit(tmp_path):
    rates = []

    class Recorded(ImageClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    trainer = make_trainer(tmp_path, max_epochs=2, limit_train_batches=4, limit_val_batches=0)
    trainer.fit(Recorded(lr=0.1), Digits())
    expected = [0.1 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx(expected)


def test_without_an_end_the_learning_rate_is_constant(tmp_path):
    rates = []

    class Recorded(ImageClassifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.trainer.should_stop = len(rates) == 5

    make_trainer(tmp_path, max_epochs=-1, limit_train_batches=3, limit_val_batches=0).fit(Recorded(lr=0.1), Digits())
    assert len(rates) >= 5
    assert set(rates) == {0.1}


@pytest.mark.parametrize(
    "model", [ImageClassifier("vit", width=8, depth=1, heads=2), LanguageModel(context=8, width=8, depth=1, heads=2)]
)
def test_a_checkpoint_loads_as_plain_data(model, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    loaded = type(model).load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    for (name, before), (_, after) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_wrong_networks_are_refused():
    with pytest.raises(ValueError, match="net='cnn' is unknown; choose one of mlp, resnet, vit"):
        ImageClassifier("cnn")
    with pytest.raises(ValueError, match="net='resnet' has no dropout"):
        ImageClassifier("resnet", dropout=0.1)
