import threading

import pytest

from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering import precedence
from sparseattn.lowering.policy import Policy, Rule
from sparseattn.lowering.precedence import effective_policy, policy_state, use_policy

DENSE, FLASH, OTHER = (Policy([Rule(use)], name) for use, name in (("dense", "d"), ("flash", "f"), ("flash", "o")))


@pytest.fixture
def default(monkeypatch):
    """The default is a policy of ours, so that these tests need no built-in backend beyond flash."""
    monkeypatch.setattr(precedence, "DEFAULT", "exact")
    return Policy.preset("exact")


@pytest.mark.parametrize("disable", [None, "1", "0"])
@pytest.mark.parametrize("context", [None, OTHER])
@pytest.mark.parametrize("environment", [None, "file"])
@pytest.mark.parametrize("option", [None, DENSE])
def test_order(disable, context, environment, option, default, monkeypatch, tmp_path):
    path = tmp_path / "policy.toml"
    FLASH.save(path)
    if disable is not None:
        monkeypatch.setenv("SPARSEATTN_DISABLE", disable)
    if environment is not None:
        monkeypatch.setenv("SPARSEATTN_POLICY", str(path))
    expected = next(p for p in (context, FLASH if environment else None, option, default) if p is not None)
    if context is None:
        found = effective_policy(option)
    else:
        with use_policy(context):
            found = effective_policy(option)
    assert found == (None if disable == "1" else expected)


def test_default_is_auto():
    assert precedence.DEFAULT == "auto"


@pytest.mark.parametrize("option", [DENSE, DENSE.to_dict(), "file", "exact"])
def test_option_takes_every_spelling(option, tmp_path):
    if option == "file":
        option = str(tmp_path / "policy.json")
        DENSE.save(option)
    assert effective_policy(option) == (Policy.preset("exact") if option == "exact" else DENSE)


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_disable_on(value, monkeypatch):
    monkeypatch.setenv("SPARSEATTN_DISABLE", value)
    with use_policy(FLASH):
        assert effective_policy(DENSE) is None


@pytest.mark.parametrize("value", ["0", "false", "FALSE", ""])
def test_disable_off(value, monkeypatch):
    monkeypatch.setenv("SPARSEATTN_DISABLE", value)
    assert effective_policy(DENSE) is DENSE


def test_disable_refuses_other_words(monkeypatch):
    monkeypatch.setenv("SPARSEATTN_DISABLE", "yes")
    with pytest.raises(PolicyError, match="SPARSEATTN_DISABLE must be 1, true, 0 or false, got 'yes'"):
        effective_policy(DENSE)


def test_empty_policy_variable_is_unset(monkeypatch):
    monkeypatch.setenv("SPARSEATTN_POLICY", "")
    assert effective_policy(DENSE) is DENSE


def test_wrong_policy_variable_names_itself(monkeypatch):
    monkeypatch.setenv("SPARSEATTN_POLICY", "exat")
    with pytest.raises(PolicyError, match=r'SPARSEATTN_POLICY=exat: .*unknown preset.*Did you mean "exact"'):
        effective_policy(DENSE)


def test_use_policy_nests_and_restores(default):
    with use_policy(FLASH) as outer:
        assert outer is FLASH
        with use_policy(DENSE):
            assert effective_policy() is DENSE
        assert effective_policy() is FLASH
    assert effective_policy() is default


def test_use_policy_restores_on_error(default):
    with pytest.raises(RuntimeError, match="inside"), use_policy(FLASH):
        raise RuntimeError("inside")
    assert effective_policy() is default


def test_use_policy_decorates():
    @use_policy(FLASH)
    def inside(level=1):
        return inside(0) if level else effective_policy()

    assert inside() is FLASH
    assert inside() is FLASH
    assert effective_policy(DENSE) is DENSE


def test_use_policy_checks_on_entry(default):
    with pytest.raises(PolicyError, match="unknown preset"), use_policy("exat"):
        pytest.fail("entered")
    assert effective_policy() is default


def test_use_policy_stays_in_its_thread():
    seen = []
    with use_policy(FLASH):
        thread = threading.Thread(target=lambda: seen.append(effective_policy(DENSE)))
        thread.start()
        thread.join()
    assert seen == [DENSE]


def test_state_changes_with_everything_outside_the_option(monkeypatch):
    states = [policy_state()]
    with use_policy(FLASH):
        states.append(policy_state())
    with use_policy(DENSE):
        states.append(policy_state())
    monkeypatch.setenv("SPARSEATTN_POLICY", "exact")
    states.append(policy_state())
    monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
    states.append(policy_state())
    assert len(set(states)) == len(states)


def test_state_is_the_same_for_the_same():
    before = policy_state()
    with use_policy(Policy([Rule("flash")], "x")):
        first = policy_state()
    with use_policy(Policy([Rule("flash")], "x")):
        assert policy_state() == first
    assert policy_state() == before


def test_state_is_cheap_and_validates_nothing(monkeypatch):
    monkeypatch.setenv("SPARSEATTN_POLICY", "no such policy")
    monkeypatch.setenv("SPARSEATTN_DISABLE", "perhaps")
    assert policy_state() == (None, "no such policy", "perhaps")
