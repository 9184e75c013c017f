from dataclasses import dataclass


@dataclass
class Bound: ...


@dataclass
class Step: ...
