"""What the compiler and the allocator are told."""
import os

import jax
import pytest

from ldm_jax import machine

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def untold(monkeypatch):
    """JAX as it starts where nobody has told it of a cache."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update(NAMES[0], None)
    jax.config.update(NAMES[1], 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_the_users(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ldm_jax" / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    assert os.listdir(jax.config.jax_compilation_cache_dir) == []


def test_the_cache_is_at_home_without_xdg(untold, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "ldm_jax" / "compiled")


def test_what_jax_was_told_stands(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    jax.config.update("jax_compilation_cache_dir", "gs://elsewhere/cache")  # as JAX_COMPILATION_CACHE_DIR does when JAX is imported
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "gs://elsewhere/cache" and os.listdir(tmp_path) == []
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_directory_that_cannot_be_made_is_gone_without(untold, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
