"""The Trainer of the page on frameworks: its loss by the definition, over accumulated batches."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from gapkernels import gap_loss

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate")),
    reason="transformers and accelerate are not installed",
)
PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```python\n(import transformers\n.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    namespace = {"torch": torch}
    exec(compile(block.group(1), "frameworks.md", "exec"), namespace)
    return namespace


def test_accumulated_batches_are_averaged_and_compute_loss_func_sums(page):
    trainer, captions = page["trainer"], page["captions"]
    assert trainer.state.global_step == 2
    trainer.args.learning_rate, trainer.args.max_steps, trainer.args.logging_steps = 0.0, 1, 1
    model = trainer.model.eval()  # it has no dropout
    scale = model.logit_scale.detach().double().exp()

    def of_batch(batch):
        with torch.no_grad():
            inputs = {name: torch.stack([c[name] for c in batch]).to(model.device) for name in batch[0]}
            outputs = model(**inputs)
        embeddings = outputs.text_embeds.double(), outputs.image_embeds.double()
        return gap_loss(*embeddings, logit_scale=scale, backend="reference").item()

    def trained(cls, **options):
        found = cls(model, trainer.args, train_dataset=captions[:16], **options)
        in_order = torch.utils.data.SequentialSampler(captions[:16])
        found._get_train_sampler = lambda *_: in_order
        return found.train().training_loss

    expected = (of_batch(captions[:8]) + of_batch(captions[8:16])) / 2
    assert trained(page["GapTrainer"]) == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate(captions[:8])["eval_loss"] == pytest.approx(of_batch(captions[:8]), rel=1e-4)

    def loss_of_outputs(outputs, labels, num_items_in_batch=None):
        return gap_loss(outputs.text_embeds, outputs.image_embeds, logit_scale=model.logit_scale.exp())

    plain = page["transformers"].Trainer
    assert trained(plain, compute_loss_func=loss_of_outputs) == pytest.approx(2 * expected, rel=1e-4)
