import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.nio.file.Path;
import java.time.Duration;
import java.util.*;
import java.util.regex.Pattern;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;
import picocli.CommandLine;

/** Every setting, by environment and by flag, with good values and bad ones. */
class SettingsTest {

    private static final String FROM_ONE = "is not a whole number from 1 to 2147483647";
    private static final String FROM_ZERO = "is not a whole number from 0 to 2147483647";
    private static final String PORTS = "is not a whole number from 1 to 65535";
    private static final String PATHS = "is not a path of 1 to 107 bytes";

    /** Environment name, flag, default, what a message says of bad values, and bad values. */
    private record Setting(String variable, String flag, String standard, String allowed, String... bad) { }

    private static final List<Setting> SETTINGS = List.of(
            new Setting("BUILDKITD_PORT", "--port", "1234", PORTS, "0", "tcp://0.0.0.0:8080", "tcp://10x0x0x7:1234",
                    "tcp://10.0.0.7:x", "", " ", "-1", "65536", "99999999999", "1234x", "0.0.0.0:1234", "1.5", "0x4d2"),
            new Setting("BUILDKITD_SOCKET", "--socket", "buildkitd.sock", PATHS, " ", "x".repeat(108), "unix://",
                    "\u00e9".repeat(54)),
            new Setting("CHECK_FREQUENCY_MS", "--check-frequency-ms", "500", FROM_ONE, "0", "-500", "0.5", "500ms", "",
                    "2147483648"),
            new Setting("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "--quiet-seconds", "10", FROM_ZERO, "-1", "10s",
                    "ten", "1e1", ""),
            new Setting("MAX_WAIT_SECONDS", "--max-wait-seconds", "0", FROM_ZERO, "-1", "20m", "never", "9999999999"),
            new Setting("LOG_FORMAT", "--log-format", "json", "is not json or text", "xml", "JSON", "jsonl", " json"),
            new Setting("LOG_PREFIX", "--log-prefix", "[PreStop Hook]", "", "--", "-V", "--debug", "--port=1"));

    private static Server server;
    private static Server.OnSocket unixServer;
    @TempDir
    private static Path directory;
    private static Path socket;

    @BeforeAll
    static void listen() {
        server = Server.start();
        socket = directory.resolve("b.sock");
        unixServer = new Server.OnSocket(socket);
    }

    @AfterAll
    static void close() {
        unixServer.close();
        server.close();
    }

    // ---- Bad input -------------------------------------------------------------------------------------------------

    @Test
    void aBadFlagIsNamedWithItsValueAndWhatIsAllowed() {
        for (Setting setting : SETTINGS) {
            for (String value : setting.bad) {
                assertThatThrownBy(() -> parse(setting.flag + "=" + value), setting.flag + "=" + value)
                        .hasMessageContaining("'" + setting.flag + "'").hasMessageContaining(setting.allowed)
                        .hasMessageContaining("'" + value + "'");
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"--port=x, Invalid value for option '--port': 'x' " + PORTS,
        "--prot=1234, --prot", "--port, --port", "extra, extra", "--once --once, --once", "@/dev/null, @/dev/null",
        "--sidecar=, --sidecar needs a path",
        "--sidecar=x --once, and does not go with --once"})
    void aCommandLineThatIsNotUnderstoodEndsTheCommand(String arguments, String message) {
        try (Hook hook = Hook.start(Hook.env(), arguments.split(" "))) {
            assertThat(hook.exitCode()).isEqualTo(2);
            assertThat(hook.out()).isEmpty();
            assertThat(hook.err()).singleElement().asString().contains(message).endsWith(" (see --help)");
        }
    }

    /** All of them bad at once but the port or the socket: what is bad counts as named, the other is not enough. */
    @ParameterizedTest
    @CsvSource({"0, BUILDKITD_SOCKET", "1, BUILDKITD_SOCKET", "2, BUILDKITD_SOCKET", "3, BUILDKITD_SOCKET",
        "0, BUILDKITD_PORT", "1, BUILDKITD_PORT"})
    void badValuesInTheEnvironmentAreLoggedAndTheDefaultsAreUsed(int nth, String good) {
        Map<String, String> env = Hook.env("BUILDKITD_SERVICE_HOST", "10.0.0.7");
        List<String> warnings = new ArrayList<>();
        for (Setting setting : SETTINGS.subList(0, SETTINGS.size() - 1)) { // no prefix is bad
            String value = setting.bad[Math.min(nth, 3)];
            env.put(setting.variable, value);
            if (!setting.variable.equals(good)) {
                warnings.add("[PreStop Hook] Ignoring " + setting.variable + ", using " + setting.standard + ": '"
                        + value + "' " + setting.allowed + ".");
            }
        }
        boolean isPort = good.equals("BUILDKITD_PORT");
        env.put(good, isPort ? " " + server.port() + "\n" : socket.toString());
        try (Hook hook = Hook.start(env, "--once")) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.out()).isEmpty();
            warnings.add("[PreStop Hook] Cannot tell whether clients are connected to port "
                    + (isPort ? server.port() + " or buildkitd.sock: nothing listens on buildkitd.sock."
                    : "1234 or " + socket + ": nothing listens on port 1234."));
            assertThat(hook.messages("warning")).containsExactlyElementsOf(warnings);
        }
    }

    @ParameterizedTest
    @CsvSource({"10, true", "11, false"})
    void aMaxWaitWithinTheQuietTimeIsWarnedOf(int maxWait, boolean isWarnedOf) {
        try (Hook hook = Hook.start(Hook.env("MAX_WAIT_SECONDS", maxWait), "--once", "--port=" + server.port())) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).hasSize(isWarnedOf ? 1 : 0).allMatch(line -> line.endsWith(
                    " MAX_WAIT_SECONDS, 10 s, is not longer than the quiet time: the hook will give up even if nobody"
                            + " is connected."));
        }
    }

    // ---- What is no value, or no option ----------------------------------------------------------------------------

    /** As Kubernetes sets it in every container of a namespace with a Service named buildkitd. */
    @ParameterizedTest
    @CsvSource({"tcp://10.96.83.161:4321, 10.96.83.161", "udp://[fd00::7]:1234, fd00::7", "sctp://a:1, a", "'', ''"})
    void whatIsEmptyOrWhatKubernetesSetsForAServiceIsNoSetting(String value, String host) {
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", value, "BUILDKITD_SERVICE_HOST", host,
                "BUILDKITD_SOCKET", socket, "CHECK_FREQUENCY_MS", "", "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "",
                "MAX_WAIT_SECONDS", "", "LOG_FORMAT", "", "DEBUG", ""), "--once")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).containsExactly("0");
            assertThat(hook.err()).isEmpty();
        }
    }

    /** Nor is one a variable or a null. A command line that ends its options is none either. */
    @ParameterizedTest
    @CsvSource({"--once,", "-h, --", "--,", "${env:PATH}, --", "_NULL_,", "--sidecar=x, --"})
    void noValueOfAVariableIsAnOption(String value, String argument) {
        Map<String, String> env = Hook.env("LOG_PREFIX", value, "BUILDKITD_PORT", server.port(), "LOG_FORMAT", "text",
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "CHECK_FREQUENCY_MS", 50, "MAX_WAIT_SECONDS", 60);
        try (Hook hook = argument == null ? Hook.start(env) : Hook.start(env, argument)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).hasSize(3).allMatch(line -> line.startsWith(value + " "))
                    .startsWith(value + " Waiting for build processes to finish...");
        }
    }

    /** JVMs take them from the environment, so an image may have them for its own. */
    @Test
    void noOptionForOtherJvmsEndsTheHook() {
        String options = "-XX:+UseG1GC -XX:+UseParallelGC -XX:+UseZGC -XX:+UseShenandoahGC -Xms64m -Xmn200m"
                + " -XX:MaxPermSize=64m --add-modules=java.sql -Dcom.sun.management.jmxremote.port=0"
                + " -Dcom.sun.management.jmxremote.authenticate=false -Dcom.sun.management.jmxremote.ssl=false";
        try (Hook hook = Hook.start(Hook.env("JAVA_TOOL_OPTIONS", options, "LOG_FORMAT", "text",
                "BUILDKITD_PORT", server.port(), "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0"))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).last().asString().contains("Exiting now.");
        }
    }

    // ---- Good values -----------------------------------------------------------------------------------------------

    @Test
    void theDefaultsAreThoseOfTheContract() {
        try (Hook hook = Hook.start(Hook.env("DEBUG", "0"), "--port=" + server.port())) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.age()).isGreaterThan(Duration.ofSeconds(10));
            assertThat(hook.checks()).hasSize(21).containsOnly("0");
            assertThat(hook.messages("info").get(1)).startsWith("[PreStop Hook] 0 connections to port " + server.port()
                    + "; nothing listens on buildkitd.sock. Waited ");
        }
    }

    /** In every form that picocli takes, whether the environment names something else or nonsense. */
    @ParameterizedTest
    @CsvSource({"=, false, good:", "' ', false, --portfolio", "=, true, good:", "' ', true, --portfolio"})
    void aFlagWinsOverTheEnvironment(String sign, boolean nonsense, String prefix) {
        Map<String, String> env = Hook.env("BUILDKITD_PORT", 9, "BUILDKITD_SOCKET", "other.sock", "CHECK_FREQUENCY_MS",
                600_000, "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0, "MAX_WAIT_SECONDS", 30, "LOG_FORMAT", "json",
                "LOG_PREFIX", "other:");
        if (nonsense) {
            SETTINGS.forEach(setting -> env.put(setting.variable, setting.bad[0]));
        }
        String[] flags = {"--log-prefix", prefix, "--port", "" + server.port(), "--socket", socket.toString(),
            "--check-frequency-ms", "50", "--quiet-seconds", "3600", "--max-wait-seconds", "2", "--log-format", "text"};
        for (int i = 0; sign.equals("=") && i < flags.length; i += 2) {
            flags[i] += "=" + flags[i + 1];
            flags[i + 1] = "--debug";
        }
        env.put("PATH", "/nowhere"); // so that no tool takes its time
        flags = Arrays.stream(flags).distinct().toArray(String[]::new);
        try (Hook hook = Hook.start(env, flags)) {
            assertThat(hook.exitCode()).isEqualTo(124);
            String seen = "0 connections to port " + server.port() + " and 0 to " + socket + ".";
            assertThat(hook.err()).allMatch(line -> line.startsWith(prefix + " "))
                    .contains(prefix + " Waiting for build processes to finish...", prefix + " " + seen
                            + " Waited 0 s so far.").endsWith(prefix + " Giving up after MAX_WAIT_SECONDS, 2 s: "
                            + seen.replaceFirst("[.]$", "") + ".");
            assertThat(hook.checks().size()).isGreaterThan(sign.equals("=") ? 3 : -1);
        }
    }

    @Test
    void theSocketMayBeAnAddressOrAnyPathOrNothing() {
        Map.of("unix:///run/-x", "/run/-x", " /run/-x\n", "/run/-x", "-x", "-x", "/run/[\\E(", "/run/[\\E(", "", "",
                "x".repeat(107), "x".repeat(107), "/a  b", "/a  b").forEach(
                        (value, path) -> assertThat(parse("--socket=" + value).socket).isEqualTo(path));
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_SOCKET", ""), "--once", "--port=1")) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.messages("warning")).singleElement().asString()
                    .endsWith(" to port 1: nothing listens on port 1.");
        }
    }

    @ParameterizedTest
    @CsvSource({"1, true, false", "'', true, true", "'', false, false"})
    void debugIsOnByEnvironmentOrByFlag(String variable, boolean isOn, boolean byFlag) {
        Map<String, String> env = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0", "DEBUG", variable);
        try (Hook hook = Hook.start(env, "--port=" + server.port(), byFlag ? "--debug" : "--log-prefix=x")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("debug")).hasSize(isOn ? 2 : 0);
        }
    }

    // ---- What it prints --------------------------------------------------------------------------------------------

    @Test
    void oncePrintsTheCountAndNothingElseAndFailsWhereItCannotPrint() {
        try (Server own = Server.start();
                Server.OnSocket other = new Server.OnSocket(directory.resolve("other.sock"))) {
            String[] flags = {"--once", "--port", "" + own.port(), "--socket", directory + "/other.sock"};
            own.connect();
            own.connect();
            other.connect();
            try (Hook hook = Hook.start(Hook.env(), flags); Hook full = Hook.startWith(
                    List.of("sh", "-c", "exec \"$@\" >/dev/full", "sh"), Hook.env(), flags)) {
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.out()).containsExactly("3");
                assertThat(hook.err()).isEmpty();
                assertThat(full.exitCode()).isEqualTo(1);
                assertThat(full.messages("warning")).containsExactly(
                        "[PreStop Hook] Could not print the number of connections.");
            }
        }
    }

    @Test
    void helpNamesEveryFlagItsVariableItsDefaultAndTheExitCodesAndVersionIsOneLine() {
        try (Hook hook = Hook.start(Hook.env(), "--help"); Hook version = Hook.start(Hook.env(), "--version")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
            String help = String.join("\n", hook.out()).replaceAll("\\s+", " ");
            SETTINGS.forEach(setting -> assertThat(help).containsPattern(setting.flag + "=\\w+ [^)]*(\\(--[^)]*\\)"
                    + "[^)]*)?\\(" + setting.variable + "\\) Default: " + Pattern.quote(setting.standard + " ")));
            assertThat(help).contains("--debug", "(DEBUG: any value", "--once", "--sidecar=FIFO",
                    "Exit codes: 0 quiet long enough", " 1 --once could not look", " 2 bad command line",
                    " 124 gave up at MAX_WAIT_SECONDS");
            assertThat(version.exitCode()).isZero();
            assertThat(version.out()).singleElement().asString().matches("buildkit-prestop \\d+\\.\\d+\\.\\d+");
        }
    }

    private static BuildkitPrestop parse(String flag) {
        BuildkitPrestop settings = new BuildkitPrestop();
        new CommandLine(settings).parseArgs(flag);
        return settings;
    }
}
