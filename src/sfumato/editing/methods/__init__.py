"""One file a family of methods; each registers its slugs in ``sfumato.editing.base``."""
