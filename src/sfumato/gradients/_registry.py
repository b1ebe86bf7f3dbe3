from sfumato.core import Registry

registry = Registry("gradient method")
get, names, register = registry.get, registry.names, registry.register
