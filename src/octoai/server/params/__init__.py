"""From the body of a request to what an engine is to generate. Knows neither accounts nor engines' dialects."""
