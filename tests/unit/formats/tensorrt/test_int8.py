"""What the layer by layer choice becomes: roundings for the writer, and a table for the manifest."""

from __future__ import annotations

from typing import Any

from packager.fidelity.encoders import Texts, make_texts
from packager.formats.tensorrt.encoder_graph import Group, Rounding
from packager.formats.tensorrt.int8 import OWN, PASSAGES, Choice, calibration_texts

GROUPS = (
    Group("layer.0.self", ("layer.0.self.query.weight", "layer.0.self.key.weight")),
    Group("layer.0.output", ("layer.0.output.weight",)),
)
PLAIN: dict[str, Any] = {
    "measure": "cosine", "plain": 0.95, "all": 0.98, "chosen": 0.995, "path": [["layer.0.output", 0.995]],
    "groups": [
        {"name": "layer.0.self", "damage": 0.001, "kept": False, "scale": 0.5, "clip": 1.0, "smooth": [2.0, 0.5]},
        {"name": "layer.0.output", "damage": 0.02, "kept": True, "scale": 0.1, "clip": 0.8, "smooth": None},
    ],
}  # fmt: skip
CHOICE = Choice(GROUPS, PLAIN, texts=65, calibration=64, aim=0.991)


def test_only_what_was_not_kept_is_rounded() -> None:
    assert CHOICE.rounded == {"layer.0.self": Rounding(0.5, (2.0, 0.5))}
    assert CHOICE.matrices == (2, 3)


def test_the_manifest_says_which_layers_stay_and_what_each_costs() -> None:
    """The measure before anything is kept, after each step, and every layer's own damage."""
    report = CHOICE.report()
    assert (report["all_layers_without_evening_out"], report["all_layers"], report["as_shipped"]) == (0.95, 0.98, 0.995)
    assert report["kept_in_fp16"] == [{"name": "layer.0.output", "mean cosine then": 0.995}]
    assert [(layer["precision"], layer["damage"], layer["evened_out"]) for layer in report["layers"]] == [
        ("int8", 0.001, True),
        ("fp16", 0.02, False),
    ]


def test_scales_do_not_come_from_the_compared_texts() -> None:
    """The package's sentences are for the comparison alone; the user's own texts serve both."""
    general = make_texts(None, ()).all
    calibration = calibration_texts(make_texts(None, ()))
    assert len(calibration) == PASSAGES and not set(calibration) & set(general)
    own = tuple(f"text {number}" for number in range(300))
    texts = Texts(
        (*general, *own),
        {"general": range(len(general)), "tuning": range(len(general), len(general) + 300)},
        (None,) * (len(general) + 300),
    )
    more = calibration_texts(texts)
    assert len(more) == PASSAGES + OWN and set(more) - set(calibration) <= set(own)
