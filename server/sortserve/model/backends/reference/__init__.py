"""Plain torch, on any device and in any dtype: what the others are tested against."""
