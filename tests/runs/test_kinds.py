"""What a signature says of a setting is held against it before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from runs.build import SettingError, build_part
from runs.kinds import fits, kind, wrong_kinds
from tests.jobs import configure


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "words"),
    [
        (bool, [True, False], [1, 0.0, "true", None, []], "true or false"),
        (int, [3, -1], [True, 3.0, "3", None, [3]], "an integer"),
        (float, [3, 0.5, float("inf")], [False, "0.5", None, [0.5], float("nan")], "a number"),
        (str, ["x", ""], [1, True, None, ["x"]], "a word"),
        (int | None, [None, 2], ["null", 2.5, False], "an integer or null"),
        (int | float, [2, 2.5], ["2", True], "a number"),
        (bool | Literal["warn"], [True, "warn"], ["banana", 1], "true or false or warn"),
        (Literal[32, "bf16"], [32, "bf16"], [16, "32", True], "32 or bf16"),
        (Literal[32, "a"] | Literal["b", "a"] | None, ["a", "b", None], [16, "32"], "32 or a or b or null"),
        (Sequence[int], [[1, 2], []], [1, "12", [1.5], [True], ["a"], None], "a list of integers"),
        (tuple[int, ...], [[1, 2, 3]], [[None], 3], "a list of integers"),
        (tuple[float, float], [[1, 0.5]], [[], [1], [1, 2, 3], ["a", 1], 0.5], "a list of 2 numbers"),
        (tuple[float | torch.Tensor, float | torch.Tensor], [[1, 0.5]], [[1, "a"]], "a list of 2 numbers"),
        (Sequence[int | float], [[1, 0.5]], [["a"]], "a list of numbers"),
        (Sequence[int | str], [[1, "a"]], [[0.5]], "a list of values"),
        (list, [[], ["a", 1]], [1, "a"], "a list"),
        (float | torch.Tensor, [1, 0.5], ["a", [1, 2], True, None], "a number or what is built by a _target_"),
        (torch.nn.Module, [], [1, "a", True, [1], None], "what is built by a _target_"),
        (Callable[..., int], [], ["a", 1], "what is built by a _target_"),
        (Path, ["a/b"], [], None),
        (Any, [1, "a", None, [1]], [], None),
        (object, [1, "a", None], [], None),
    ],
)
def test_values_fit_annotations(hint, right, wrong, words):
    assert all(fits(value, hint) for value in right)
    assert not any(fits(value, hint) for value in wrong)
    assert words is None or kind(hint) == words


class Parent:
    def __init__(self, rate: float, *, size: int = 1, names: Sequence[str] = ()) -> None:
        self.rate, self.size, self.names = rate, size, names


class Child(Parent):
    def __init__(self, size: int | None = 2, **settings: Any) -> None:
        super().__init__(size=0 if size is None else size, **settings)


def make_child(fast: bool = False, **settings: Any) -> Child:
    return Child(**settings)


def implicit(rate: float = None) -> float | None:  # noqa: RUF013
    return rate


def named(name: str) -> str:
    return name


def silent(rate, *, size=None):
    return rate, size


def node(target, **settings):
    return OmegaConf.create({"part": {"_target_": f"{__name__}.{target}", **settings}}).part


@pytest.mark.parametrize(
    ("target", "settings", "sentence"),
    [
        ("Parent", {"rate": "fast"}, "part.rate=fast: give a number"),
        ("Child", {"rate": "fast"}, "part.rate=fast: give a number"),  # known to its parent alone
        (
            "Child",
            {"rate": 1, "size": "big"},
            "part.size=big: give an integer or null",
        ),  # the child's own
        ("make_child", {"rate": True}, "part.rate=True: give a number"),  # handed on to what is returned
        ("make_child", {"rate": 1, "fast": "banana"}, "part.fast=banana: give true or false"),
        ("named", {"name": 5}, "part.name=5: give a word, as part.name='\"5\"'"),
        ("named", {"name": [5]}, "part.name=[5]: give a word"),
        ("make_child", {"rate": 1, "names": "banana"}, "part.names=banana: give a list of words"),
        ("make_child", {"rate": 1, "names": ["a", 5, "b"]}, "part.names=['a', 5, 'b']: give a list of words, 5 is none"),
        ("Parent", {"rate": 1, "sizes": 2}, "part.sizes=2: Parent takes no such setting, is it size?"),
        ("Parent", {"rate": 1, "x": {"a": 2}}, "part.x: Parent takes no such setting; ~part.x leaves it out"),
        ("Child", {"rate": 1, "depth": 2}, "part.depth=2: Child takes no such setting; ~part.depth leaves it out"),
    ],
)
def test_the_first_wrong_kind_is_named_and_nothing_is_built(target, settings, sentence):
    with pytest.raises(SettingError) as refused:
        build_part(node(target, **settings))
    assert str(refused.value) == sentence


def refuses_null(levels: int) -> None:
    raise ValueError(f"levels={levels}: the data has some")


def only_null(levels: None) -> None:
    raise TypeError("levels")


def compares(rate: float) -> bool:
    return rate >= 0


def test_constructors_say_what_they_know_of_null():
    for target, value, sentence in [
        ("refuses_null", None, "part.levels=None: the data has some"),
        ("only_null", 17, "part.levels=17: give null"),
        ("compares", None, "part.rate=None: give a number"),
    ]:
        settings = {"rate": value} if target == "compares" else {"levels": value}
        with pytest.raises(SettingError) as refused:
            build_part(node(target, **settings))
        assert str(refused.value) == sentence


def test_what_fits_is_built_and_what_no_signature_tells_is_left_to_the_constructor():
    assert build_part(node("Child", rate=1, size=None, names=["a"])).size == 0
    assert build_part(node("implicit", rate=None)) is None  # as older code writes it
    assert build_part(node("silent", rate="anything", size=[1, "a"])) == ("anything", [1, "a"])
    (absent,) = wrong_kinds(node("not_there", rate="fast"))
    assert absent == f"part._target_={__name__}.not_there: {__name__} has no not_there"
    with pytest.raises(SettingError, match="not_there"):
        build_part(node("not_there", rate="fast"))


def test_nested_nodes_lists_of_them_and_references_are_looked_at():
    inner = {"_target_": f"{__name__}.Parent", "rate": "${word}"}
    cfg = OmegaConf.create({"word": "fast", "part": {"_target_": f"{__name__}.silent", "rate": inner, "size": [inner, inner]}})
    assert list(wrong_kinds(cfg.part)) == [
        "part.rate.rate=fast: give a number",
        *["part.size[0].rate=fast: give a number", "part.size[1].rate=fast: give a number"],
    ]


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["model/network=unet_8x8"], "model.network.checkpoint_activations", "banana"),
        (["model/network=unet_8x8"], "model.network.channel_multipliers", "[abc]"),
        ([], "model.network.dropout", "abc"),
        ([], "model.schedule.log_snr_max", "[1,2]"),
        ([], "model.optimizer.betas", "[0.9]"),
        (["data=cifar10"], "data.horizontal_flip", "banana"),
        (["data=image_folder"], "data.max_memory_gb", "abc"),
        ([], "trainer.deterministic", "banana"),
        ([], "trainer.max_time", "-1"),
        (["callbacks=early_stopping"], "callbacks.early_stopping.check_on_train_epoch_end", "3"),
    ],
)
def test_settings_of_the_framework_and_of_the_libraries(tmp_path, overrides, name, value):
    cfg = configure(tmp_path, "model=ddpm", *overrides, f"{name}={value}")
    part = cfg[name.split(".")[0]]
    sentences = [one for group in (part.values() if name.startswith("callbacks") else [part]) for one in wrong_kinds(group)]
    shown = value.replace("[abc]", "['abc']").replace("[1,2]", "[1, 2]")
    assert [one.partition(": give ")[0] for one in sentences] == [f"{name}={shown}"]


def test_null_that_a_constructor_takes_and_nobody_could_use_is_refused():
    assert fits(None, Callable[..., int]) is False
    with pytest.raises(SettingError) as refused:
        build_part(node("calls_later", function=None))
    assert str(refused.value) == "part.function=None: give what is built by a _target_"


def calls_later(function: Callable[[], int]) -> Callable[[], int]:
    return lambda: function()
