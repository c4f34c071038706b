"""The service behind the SDK: OctoAI's and OpenAI's HTTP API over engines that generate the text."""
