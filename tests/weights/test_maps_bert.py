"""The config of LDMBertModel as our tower's arguments. (tests/parity/test_more_pipelines.py compares what the towers give.)"""
import inspect

import pytest

from ldm_jax.models.bert import bert_text
from ldm_jax.types import UserError
from ldm_jax.weights.maps_bert import DEFAULTS, bert_arguments, without_words


def test_defaults_are_the_builders_own():
    own = {name: p.default for name, p in inspect.signature(bert_text).parameters.items()}
    assert bert_arguments({"model_type": "ldmbert"}) == {name: own[name] for name in bert_arguments({})}
    changed = bert_arguments({key: "relu" if key == "activation_function" else value + 1 for key, value in DEFAULTS.items()})
    assert not {name for name, value in changed.items() if value == own[name]}


@pytest.mark.parametrize("option, message", [
    ({"activation_function": "tanh"}, "activation_function='tanh'"), ({"head_dim": 2.5}, "head_dim=2.5"), ({"use_magic": 1}, "use_magic=1"),
    ({"is_decoder": True}, "is_decoder=True")])
def test_refused_by_name(option, message):
    with pytest.raises(UserError, match=message):
        bert_arguments(option)


def test_the_layer_that_guesses_words_is_left_out():
    assert without_words({"to_logits.weight": 1, "to_logits.bias": 2, "model.layer_norm.bias": 3}) == {"model.layer_norm.bias": 3}
