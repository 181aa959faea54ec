"""What the scheduler is told of hosts that are not its own: what they have, and which versions run there."""

from harness.frozen import Frozen

Versions = tuple[tuple[str, str], ...]


class Site(Frozen):
    """`hardware`: each family as shown to a reader, counts included. `kinds`: what of it answers depend on, so that a
    cluster that lost or gained a host is still the same. `versions`: by family."""

    hardware: tuple[str, ...]
    kinds: tuple[str, ...]
    versions: tuple[tuple[str, Versions], ...]

    def versions_of(self, family: str) -> Versions:
        return dict(self.versions).get(family, ())

    @property
    def all_versions(self) -> Versions:
        """Of all families, each once; a name that differs between families says which one it is of."""
        found = dict.fromkeys((name, version) for _, own in self.versions for name, version in own)
        names = [name for name, _ in found]
        told = (
            (name if names.count(name) == 1 else f"{name} ({', '.join(self._families_with(name, version))})", version)
            for name, version in found
        )
        return tuple(sorted(told))

    def _families_with(self, name: str, version: str) -> list[str]:
        return [family for family, own in self.versions if (name, version) in own]
