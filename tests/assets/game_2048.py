"""2048, as TRL's example has it, but seeded: the samples of a prompt play the same game, whose reward is scaled."""

import itertools
import math
import random


class Game2048:
    """A board of 4 x 4 that ends when nothing can be moved."""

    GOOD_SCORE = 20_000  # about that of a game that reaches the tile 2048

    def reset(self, seed=0, **_):
        self.random = random.Random(seed)
        self.board, self.score, self.done = [[0] * 4 for _ in range(4)], 0, False
        self._spawn()
        self._spawn()
        return self._render()

    def move(self, direction: str) -> str:
        """
        Slide all tiles in one direction; equal tiles that meet become one of their sum.

        Args:
            direction: One of left, right, up and down.

        Returns:
            The score, the board, and whether the game is over.
        """
        if self.done:
            raise ValueError("Game over.")
        direction = direction.strip().lower()
        if direction not in ("left", "right", "up", "down"):
            raise ValueError("The direction must be left, right, up or down.")
        rows = (
            [list(row) for row in zip(*self.board, strict=True)]
            if direction in ("up", "down")
            else self.board
        )
        backwards = direction in ("right", "down")
        slid = [slide(row[::-1] if backwards else row) for row in rows]
        rows = [row[::-1] if backwards else row for row, _ in slid]
        board = [list(row) for row in zip(*rows, strict=True)] if direction in ("up", "down") else rows
        if board != self.board:
            self.board = board
            self.score += sum(gain for _, gain in slid)
            self._spawn()
        self.done = not self._can_move()
        return self._render()

    def get_reward(self):
        """From 0 to about 1, by the logarithm of the score: the first merges count, too."""
        return math.log1p(self.score) / math.log1p(self.GOOD_SCORE)

    def _spawn(self):
        free = [(y, x) for y in range(4) for x in range(4) if not self.board[y][x]]
        y, x = self.random.choice(free)
        self.board[y][x] = 4 if self.random.random() < 0.1 else 2

    def _can_move(self):
        lines = self.board + [list(column) for column in zip(*self.board, strict=True)]
        return any(0 in line or any(a == b for a, b in itertools.pairwise(line)) for line in lines)

    def _render(self):
        board = "\n".join(" ".join(f"{tile:3d}" for tile in row) for row in self.board)
        return f"\nscore={self.score}\n{board}\ndone={self.done}"


def slide(row):
    """Four tiles moved to the left -> the row, and the sum of the tiles that were made."""
    tiles, made, gain = [tile for tile in row if tile], [], 0
    while tiles:
        tile = tiles.pop(0)
        if tiles and tiles[0] == tile:
            tile += tiles.pop(0)
            gain += tile
        made.append(tile)
    return made + [0] * (4 - len(made)), gain
