// Patient: a long text takes seconds on a busy machine.
export default { test: { environment: "happy-dom", testTimeout: 60_000, include: ["tests/*.test.js"] } };
