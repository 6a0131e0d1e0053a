// Calls functions of the widgets: reads [[module, function, arguments], …], prints the results.
import { readFileSync } from "node:fs";

const calls = JSON.parse(readFileSync(0, "utf8"));
const results = [];
for (const [module, name, args] of calls) {
  const functions = await import(new URL(`../../mixconv/widgets/${module}.mjs`, import.meta.url));
  results.push(functions[name](...args));
}
console.log(JSON.stringify(results));
