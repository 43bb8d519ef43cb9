"""Who may call from a browser."""

from __future__ import annotations

import pytest

from osync.gateway.cors import Policy, Verdict

OPEN = Policy((), is_loopback=False, hostname="box")
LOCAL = Policy((), is_loopback=True, hostname="box")


def judge(policy: Policy, method: str = "POST", **headers: str) -> Verdict:
    return policy.decide(method, headers.get("origin", ""), headers.get("host", ""))


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost", True),
        ("https://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("http://0.0.0.0", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://abc", True),
        ("http://localhost.evil.com", False),
        ("http://evil.com", False),
        ("https://evil.com:127.0.0.1", False),
        ("null", False),
        ("chrome-extension://abc", False),
    ],
)
def test_origins_allowed_by_default(origin, allowed):
    assert judge(OPEN, origin=origin, host="proxy:8000").status == (0 if allowed else 403)


def test_configured_origins_and_wildcards():
    policy = Policy(("https://chat.example.com", "https://*.corp.example", "chrome-extension://*"), False, "box")
    for origin in ("https://chat.example.com", "https://a.corp.example", "chrome-extension://xyz"):
        verdict = judge(policy, origin=origin, host="proxy")
        assert verdict.status == 0
        assert ("Access-Control-Allow-Origin", origin) in verdict.headers
    assert judge(policy, origin="https://corp.example.evil", host="proxy").status == 403
    assert judge(policy, origin="https://.corp.exampl", host="proxy").status == 403


def test_any_origin():
    verdict = judge(Policy(("*",), False, "box"), origin="https://x.example", host="proxy")
    assert dict(verdict.headers)["Access-Control-Allow-Origin"] == "*"


def test_same_host_is_no_cors_request():
    verdict = judge(OPEN, origin="http://proxy.example:8000", host="proxy.example:8000")
    assert (verdict.status, verdict.headers) == (0, ())


def test_preflight():
    verdict = judge(OPEN, "OPTIONS", origin="http://localhost:3000", host="proxy:8000")
    headers = dict(verdict.headers)
    assert verdict.status == 204
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "Authorization" in headers["Access-Control-Allow-Headers"]
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert judge(OPEN, "OPTIONS", origin="http://evil.com", host="proxy").status == 403
    assert judge(OPEN, "OPTIONS", host="proxy").status == 405
    assert judge(LOCAL, "OPTIONS", host="localhost:8000").status == 204
    assert judge(LOCAL, "OPTIONS", host="127.0.0.1:8000").status == 405


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("::1", True),
        ("192.168.1.7", True),
        ("0.0.0.0:8000", True),
        ("localhost", True),
        ("BOX:8000", True),
        ("x.local", True),
        ("host.docker.internal:8000", True),
        ("", True),
        ("evil.com", False),
        ("evil.com:8000", False),
        ("8.8.8.8", False),
        ("localhost.evil.com", False),
    ],
)
def test_host_on_a_loopback_listener(host, allowed):
    assert judge(LOCAL, host=host).status == (0 if allowed else 403)
    assert judge(OPEN, host=host).status == 0
