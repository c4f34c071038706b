"""JSON Schemas that an engine can be given without harm to others, and how llama.cpp reads them."""
