import pytest

from helix_runtime.vllm_plugin.tpa_scope import TPAView, _get_tp_group, in_tpa_scope, tpa_scope

VIEW = TPAView(world_size=2, rank_in_group=1)


def test_the_scope_shows_the_view_and_its_inside_can_be_left():
    group = object()
    get_tp_group = _get_tp_group(lambda: group)
    assert get_tp_group() is group
    with tpa_scope(VIEW):
        assert get_tp_group() is VIEW and in_tpa_scope()
        with tpa_scope(None):
            assert get_tp_group() is group and not in_tpa_scope()
        assert get_tp_group() is VIEW
    assert get_tp_group() is group


def test_an_error_inside_leaves_the_scope():
    with pytest.raises(KeyError), tpa_scope(VIEW):
        raise KeyError
    assert not in_tpa_scope()


def test_the_view_offers_no_collectives():
    with pytest.raises(AttributeError):
        _ = VIEW.all_reduce
