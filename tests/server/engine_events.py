"""Events of an engine as it writes them, and what they are an answer to."""

from octoai.server.engines.base import Generation

ONE = Generation(max_tokens=100_000, messages=[{"role": "user", "content": "x"}])


def saying(text: str, usage: str, reason: str = "null") -> bytes:
    choice = b'{"index":0,"delta":{"content":"%b"},"finish_reason":%b}' % (text.encode(), reason.encode())
    return b'data: {"choices":[%b],"usage":%b}\n\n' % (choice, usage.encode())


BOTH = '{"prompt_tokens":3,"total_tokens":%d,"completion_tokens":%d}'


TIMED = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a"}}],"created":1795887152,"id":"c1",'
    b'"timings":{"cache_n":0,"prompt_n":31,"prompt_ms":175.2,"predicted_n":9,"predicted_ms":0.001,"predicted_per_s":1e-05}}'
)
