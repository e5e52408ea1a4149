"""Plans on disk, of whatever method: back as they were, refused by name where they are damaged, bound to their model."""

import json

import pytest
import torch
from torch import nn

from sparse_core.attention.calibrate import attention_inputs, model_hash
from sparse_core.attention.layer import DenseAttention
from sparse_core.attention.slot import AttentionSlot
from sparse_core.methods.attention.double_sparsity import ChannelPlan
from sparse_core.methods.attention.minference import HeadPlan, Pattern
from sparse_core.methods.attention.moa import Plan, SpanRule

MODEL = nn.Linear(3, 3)
SIGNED = model_hash(MODEL)
HEADS = [Pattern("a_shape", (head, 64)) for head in range(12)]
PLANS = {
    "channel plan": ChannelPlan(channels=torch.tensor([[3, 1], [0, 2]]), width=8, model=SIGNED),
    "head plan": HeadPlan(patterns=tuple(HEADS), scores=tuple(float(n) for n in range(12)), model=SIGNED),
    "plan of spans": Plan(
        rules=((SpanRule(16), SpanRule(0, 0.5)),), block=16, sink=16, losses={64: 1.5}, model=SIGNED
    ),
}


def fields(plan):
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in vars(plan).items()}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("sort_keys", [False, True])
def test_a_plan_comes_back_as_it_was_whatever_the_order_of_its_keys(tmp_path, kind, sort_keys):
    plan = PLANS[kind]
    path = plan.save(tmp_path / "new" / "folder" / "plan.json")
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=sort_keys))
    assert fields(type(plan).load(path)) == fields(plan)


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_knows_its_model(kind):
    PLANS[kind].validate(MODEL)
    with pytest.raises(ValueError, match=f"plan: expected one for the model .*, got one for {SIGNED}; calib"):
        PLANS[kind].validate(nn.Linear(3, 3))


def heads(**rows):
    return json.dumps({"model": "", "heads": rows})


def channels(rows, width=8):
    return json.dumps({"width": width, "model": "", "channels": rows})


def spans(rules, **others):
    return json.dumps({"rules": rules, "losses": {}, **others})


DAMAGED = {
    "channel plan": [
        channels([[0.5, 1.2]]), channels([[1.0, 2.0]]), channels([[1, 1]]), channels([[9]]), channels([["a"]]),
        channels([[0], [1, 2]]), channels([[0]], "8"), channels([]),
    ],
    "head plan": [
        heads(**{"0": ["a_shape", -1, 2, 0.1]}), heads(**{"0": ["a_shape", "x", 2, 0.1]}),
        heads(**{"0": ["a_shape", 1.5, 2.5, 0.1]}), heads(**{"0": ["a_shape", 1, 2]}), heads(),
        heads(**{"1": ["a_shape", 1, 2, 0.1]}), heads(a=["a_shape", 1, 2, 0.1]),
        heads(**{"0": ["a_shape", 1, 2, "x"]}), heads(**{"0": [["a_shape"], 1, 2, 0.1]}), '{"heads": []}',
        heads(**{"0": ["a_shape", 1, 2, 0.1], "2": ["a_shape", 1, 2, 0.1]}), heads(**{"0": 3}),
    ],
    "plan of spans": [
        spans(1), spans([]), spans([[{"alpha": 1}], []]), spans([[{"alpha": "x"}]]), spans([[{"beta": 1}]]),
        spans([[{"alpha": 1, "gamma": 2}]]), spans([[{"alpha": 16}]], block=16.5), spans([[{"alpha": 16}]], more=1),
        '{"rules": [[{"alpha": NaN, "beta": 0.5}]], "losses": {}}',
    ],
}  # fmt: skip
ALIKE = ["", "[]", "[1]", "null", "3", '"text"', "{}", "\x00\xff"]
FILES = [(kind, text) for kind, texts in DAMAGED.items() for text in (*texts, *ALIKE)]


@pytest.mark.parametrize(("kind", "text"), FILES)
def test_a_damaged_file_is_named(tmp_path, kind, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=rf"^{path}: expected a {kind}, got [\s\S]+; calibrate again$"):
        type(PLANS[kind]).load(path)


class Model(nn.Module):
    """A layer, a slot with one in it, and noise in training."""

    def __init__(self):
        super().__init__()
        self.layer, self.slot, self.noise = DenseAttention(), AttentionSlot(2, 4), nn.Dropout(0.5)

    def forward(self, x):
        x = self.noise(x)
        return self.slot(self.layer(x, 2 * x, 3 * x), x, x)


def test_the_inputs_of_every_attention_are_seen_once_and_the_model_is_left_as_it_was():
    model = Model().train()
    batches = [torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for batch, inputs in zip(batches, attention_inputs(model, batches), strict=True):
        assert list(inputs) == ["layer", "slot"]
        q, k, v = inputs["layer"]
        assert torch.equal(q, batch)
        assert torch.equal(k, 2 * batch)
        assert torch.equal(v, 3 * batch)
        assert torch.equal(inputs["slot"][1], batch)
    assert model.training
    assert model.noise.training
    with pytest.raises(ValueError, match="model: expected at least one AttentionLayer or AttentionSlot, got"):
        next(attention_inputs(MODEL, batches))
    twice = nn.Sequential(nn.ModuleDict({"slot": AttentionSlot(2, 4)}))
    with pytest.raises(ValueError, match=r"model: expected one call of every attention, got 2 of 0.slot"):
        next(attention_inputs(twice, batches, lambda model, x: [model[0]["slot"](x, x, x) for _ in range(2)]))
