"""Training data: chats with images and videos, of which each rank decodes its own frames."""
