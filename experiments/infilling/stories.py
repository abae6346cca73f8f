"""Short stories, a first sentence and the last one; written for this project."""

from __future__ import annotations

from typing import NamedTuple


class Story(NamedTuple):
    """The beginning and the ending, each one sentence."""

    beginning: str
    ending: str


TRAINING = (
    Story("Tom wanted to buy a new bicycle.", "At last he rode it to school."),
    Story(
        "Anna woke up and heard rain on the roof.", "She was glad that she had not left it at home."
    ),
    Story("The old dog could not find his bone.", "He carried it back to his bed."),
    Story(
        "Maria planted a small seed in her garden.",
        "Everyone on the street came to see the flower.",
    ),
    Story(
        "Ben forgot his lunch on the kitchen table.", "He thanked his friend and ate half of it."
    ),
    Story("The kitchen was full of smoke.", "They ordered a pizza instead."),
    Story("Lucy was afraid of the dark.", "Now she sleeps well every night."),
    Story("A boat was lost in the fog.", "The captain waved to the keeper and sailed home."),
    Story("Sam had never seen the sea.", "His shoes were full of sand."),
    Story("The teacher asked a hard question.", "The whole class clapped for her."),
    Story("My sister lost her gold ring.", "We found it inside the fish."),
    Story("Peter practiced the piano every day.", "The audience stood up and cheered."),
    Story("It was the coldest day of the year.", "The children built a snowman on it."),
    Story("A bird flew in through the open window.", "Then it flew away over the trees."),
    Story("Grandma baked a large apple pie.", "Only the crumbs were left on the plate."),
    Story("Jack heard a strange noise in the attic.", "It was only a family of mice."),
    Story("The train was two hours late.", "She missed her own wedding."),
    Story("Emma wrote a letter to her best friend.", "The answer came a week later."),
    Story("The farmer's only cow was sick.", "By morning it was eating grass again."),
    Story("Two boys found a map in an old book.", "Under the tree they found a box of coins."),
    Story("Nina could not reach the top shelf.", "Now she could take down the jar of honey."),
    Story("The lights went out all over the city.", "They told stories until the morning."),
    Story("David wanted to surprise his mother.", "She cried with joy when she saw the cake."),
    Story("The king could not fall asleep.", "After the third song he was snoring."),
    Story("Kate's car broke down on the highway.", "She was only ten minutes late for work."),
    Story("A little fox was caught in a trap.", "It ran back into the forest."),
    Story("The baker ran out of flour.", "That day he sold only soup."),
    Story("Leo was the slowest runner in his team.", "He won the race by one second."),
    Story("The museum was closed on Monday.", "We fed the ducks all afternoon."),
    Story("Mr. Hill never smiled at anyone.", "Since then he smiles at every child."),
    Story(
        "The bridge was washed away by the river.", "The village could cross to the market again."
    ),
    Story("Olga lost the key to her house.", "She climbed in and laughed."),
)

HELD_OUT = (
    Story("Paul's cat climbed to the top of a tall tree.", "The cat was safe in his arms again."),
    Story("Rosa saved her money for a whole year.", "She plays it every evening."),
    Story("The tent was too small for five people.", "They looked at the stars all night."),
    Story("A stranger left a box at the door.", "The puppy has lived with us ever since."),
    Story("Mike did not study for the test.", "He promised to work harder next time."),
    Story(
        "The snow blocked the road to the hospital.", "The baby was born in the back of a tractor."
    ),
    Story("The clock in the tower had stopped.", "At noon it rang twelve times."),
    Story("Julia burned her hand on the stove.", "The next day it did not hurt anymore."),
)
