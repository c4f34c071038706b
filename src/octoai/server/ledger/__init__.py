"""What requests used and what it cost, kept whatever happens: on their path, and in the database behind it."""
