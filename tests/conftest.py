"""What tests share: a cache folder of their own, so that none reads what another, or the user, keeps."""

import pytest

from fewbits.files.open import open_checkpoint
from fewbits.release.verify import Outcome, verify
from tests.tiny import save_tiny, spm_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def only_gguf_is_verified(request, monkeypatch):
    """A process that imports transformers takes seconds: tests/engines has the tests that start one."""
    if "engines" not in request.path.parts:
        other = Outcome("none", "not checked", reason="tests/engines does")

        def asked(out, *given, reference=None, **named):
            return verify(out, *given, **named) if out.suffix == ".gguf" else other

        monkeypatch.setattr("fewbits.workflow.quantize.verify", asked)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model whose tokenizer puts nothing before a text."""
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "plain"))


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """A model whose tokenizer puts bos before a text."""
    folder = tmp_path_factory.mktemp("model") / "headed"
    return open_checkpoint(save_tiny("LlamaForCausalLM", folder, spm_tokenizer()))


@pytest.fixture(params=["plain", "headed"])
def model(request):
    return request.getfixturevalue(request.param)
