"""What generates the text: one interface (`base`), and what stands behind it."""
