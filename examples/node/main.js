// Writes and reads files, and runs two child processes: one to its end, one as a stream.
const { execFileSync, spawn } = require("node:child_process");
const { createHash } = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");

fs.mkdirSync("out/words", { recursive: true });
const text = "the quick brown fox jumps over the lazy dog and the dog sleeps on";
for (const word of new Set(text.split(" "))) {
  fs.writeFileSync(path.join("out/words", `${word}.txt`), createHash("sha256").update(word).digest("hex") + "\n");
}
console.log(`${fs.readdirSync("out/words").length} files in out/words`);
console.log("sh says:", execFileSync("sh", ["-c", "ls out/words | wc -l"], { encoding: "utf8" }).trim());

const sort = spawn("sort", ["-u"]);
let sorted = "";
sort.stdout.on("data", (chunk) => (sorted += chunk));
sort.on("close", async (code) => {
  await fs.promises.writeFile("out/sorted.json", JSON.stringify(sorted.trim().split("\n")));
  console.log(`sort ended with ${code}`);
});
sort.stdin.end(text.split(" ").join("\n") + "\n");
