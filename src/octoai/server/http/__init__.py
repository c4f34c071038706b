"""HTTP/1.1 as connections see it: what comes in, what goes out, how it ends. Knows nothing of what is asked."""
