import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;

import com.fasterxml.jackson.databind.*;
import java.io.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;
import java.util.stream.Stream;

/**
 * The hook as a process of its own, with the classes and JVM options that JBang runs it with and an environment that
 * holds nothing but PATH and what the test sets. Close it: what still runs is ended then.
 */
final class Hook implements AutoCloseable {

    static final Path REPOSITORY = Path.of("").toAbsolutePath();
    static final Path SCRIPT = REPOSITORY.resolve("buildkit-prestop.java");
    /** How long a test waits for what should come at once: machines are busy, and JBang's starts form a queue. */
    static final Duration PATIENCE = Duration.ofMinutes(10);

    private static final String CHECK = "Active connections to buildkitd: ";
    private static final ObjectMapper JSON = new ObjectMapper().enable(DeserializationFeature.FAIL_ON_TRAILING_TOKENS);
    private static String classpath;

    private final Process process;
    private final List<Thread> readers = new ArrayList<>();
    private final List<String> out;
    private final List<String> err;
    private final long started = System.nanoTime();

    private Hook(ProcessBuilder builder) {
        process = assertDoesNotThrow(builder::start);
        out = collect(process.inputReader(StandardCharsets.UTF_8));
        err = collect(process.errorReader(StandardCharsets.UTF_8));
    }

    /** Settings for a test: a check every 100 ms, and a quiet time of 1 s. */
    static Map<String, String> quick(int port) {
        return env("BUILDKITD_PORT", port, "CHECK_FREQUENCY_MS", 100, "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 1);
    }

    /** A map of the names and values, given in turn. */
    static Map<String, String> env(Object... namesAndValues) {
        Map<String, String> env = new HashMap<>();
        for (int i = 0; i < namesAndValues.length; i += 2) {
            env.put(namesAndValues[i].toString(), namesAndValues[i + 1].toString());
        }
        return env;
    }

    /** Starts the hook. PATH is the test's own unless env sets it. */
    static Hook start(Map<String, String> env, String... args) { return startWith(List.of(), env, args); }

    /** Starts the hook behind another command, such as setpriv or unshare with its options. */
    static Hook startWith(List<String> wrapper, Map<String, String> env, String... args) {
        return run(Stream.of(wrapper, javaCommand(), List.of(args)).flatMap(List::stream).toList(), env);
    }

    /** Starts any command in the environment of a hook. */
    static Hook run(List<String> command, Map<String, String> env) {
        ProcessBuilder builder = new ProcessBuilder(command);
        builder.environment().clear();
        builder.environment().put("PATH", System.getenv("PATH"));
        builder.environment().putAll(env);
        return new Hook(builder);
    }

    /** The command line that JBang makes of the script, without the arguments. */
    static List<String> javaCommand() {
        List<String> java = List.of(System.getProperty("java.home") + "/bin/java");
        List<String> main = List.of("-cp", classpath(), "BuildkitPrestop");
        return Stream.of(java, directive("JAVA_OPTIONS"), main).flatMap(List::stream).toList();
    }

    /** The words behind a directive in the script's header. */
    static List<String> directive(String name) {
        return assertDoesNotThrow(() -> Files.readAllLines(SCRIPT)).stream()
                .filter(line -> line.startsWith("//" + name + " "))
                .flatMap(line -> Stream.of(line.split(" ")).skip(1)).toList();
    }

    private static synchronized String classpath() {
        if (classpath == null) {
            ProcessBuilder jbang = new ProcessBuilder("sh", "-c",
                    "test/jbang build \"$0\" >&2 && test/jbang info classpath \"$0\"", SCRIPT.toString());
            jbang.redirectError(ProcessBuilder.Redirect.INHERIT);
            classpath = assertDoesNotThrow(() -> jbang.start().inputReader().readLine());
        }
        return classpath;
    }

    Process process() { return process; }

    /** Time since the start. */
    Duration age() { return Duration.ofNanos(System.nanoTime() - started); }

    /** The exit code, once the hook has ended and all its output is read. */
    int exitCode() {
        waitUntil("the hook ends", () -> !process.isAlive());
        waitUntil("its output ends", this::isAllRead);
        return process.exitValue();
    }

    private boolean isAllRead() { return readers.stream().noneMatch(Thread::isAlive); }

    /** The lines printed on stdout so far. */
    List<String> out() { return List.copyOf(out); }

    /** The lines printed on stderr so far. */
    List<String> err() { return List.copyOf(err); }

    /** The log so far, each line parsed as JSON. */
    List<JsonNode> log() { return err().stream().map(Hook::json).toList(); }

    /** The messages of the log so far that have this level. */
    List<String> messages(String level) {
        return log().stream().filter(line -> line.get("level").asText().equals(level))
                .map(line -> line.get("message").asText()).toList();
    }

    /** Waits until a line of stderr holds the text. */
    Hook awaitLog(String text) {
        waitUntil("the log says: " + text, () -> err().stream().anyMatch(line -> line.contains(text)));
        return this;
    }

    /** Whether it has said that it leaves. On a very busy machine its last lines can be lost: it gives them 5 s. */
    boolean saidItsLast() { return !err().isEmpty() && err().get(err().size() - 1).contains("Exiting now."); }

    /** What each check has seen so far, if DEBUG is set: a number, or "unknown". */
    List<String> checks() {
        return err().stream().filter(line -> line.contains(CHECK))
                .map(line -> line.substring(line.indexOf(CHECK) + CHECK.length()).split("\"", 2)[0]).toList();
    }

    /** Waits until so many checks have seen this, for at most PATIENCE. Fails where the hook ends before. */
    Hook awaitChecks(String seen, int number) {
        waitUntil(number + " checks see " + seen,
                () -> isAllRead() || Collections.frequency(checks(), seen) >= number);
        if (Collections.frequency(checks(), seen) < number) {
            throw new AssertionError("it ended before " + number + " checks saw " + seen + ": " + err());
        }
        return this;
    }

    @Override
    public void close() {
        List<ProcessHandle> children = process.descendants().toList();
        process.destroyForcibly();
        children.forEach(ProcessHandle::destroyForcibly);
        process.onExit().completeOnTimeout(process, 10, TimeUnit.SECONDS).join();
    }

    /** Parses one line, which must be one whole JSON value. */
    static JsonNode json(String line) {
        return assertDoesNotThrow(() -> JSON.readValue(line, JsonNode.class), () -> "not JSON: " + line);
    }

    /** Waits for the condition, at most PATIENCE. */
    static void waitUntil(String what, BooleanSupplier condition) {
        long start = System.nanoTime();
        for (long asked = start; !condition.getAsBoolean(); asked = System.nanoTime()) {
            if (asked - start > PATIENCE.toNanos()) {
                throw new AssertionError("still waiting after " + PATIENCE.toSeconds() + " s: " + what);
            }
            // What takes long to ask, such as a command, is asked more seldom.
            pause(Math.min(500, 10 + 4 * TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - asked)));
        }
    }

    /** Sleeps, where time itself is what is tested. */
    static void pause(long ms) { assertDoesNotThrow(() -> Thread.sleep(ms)); }

    /** Starts to collect the lines as they come. */
    private List<String> collect(BufferedReader text) {
        List<String> lines = Collections.synchronizedList(new ArrayList<>());
        Thread reader = new Thread(() -> {
            try (text) {
                text.lines().forEach(lines::add);
            } catch (IOException | UncheckedIOException e) {
                // the process was ended by close()
            }
        });
        reader.setDaemon(true);
        reader.start();
        readers.add(reader);
        return lines;
    }
}
