"""Pictures: kept, taken in, and what they say of how they were made."""
