import json
from octoai.client import OctoAI
from octoai.text_gen import ChatMessage

client = OctoAI()
completion = client.text_gen.create_chat_completion(
    model="meta-llama-3-8b-instruct",
    messages=[
        ChatMessage(role="system", content="Below is an instruction that describes a task. Write a response that appropriately completes the request."),
        ChatMessage(role="user", content="Write a blog about Seattle"),
    ],
    max_tokens=150,
)
print(json.dumps(completion.dict(), indent=2))
