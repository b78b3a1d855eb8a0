import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Every setting, by environment and by flag, with good values and bad ones. */
class SettingsTest {

    private static final String PORTS = "is not a whole number from 1 to 65535";
    private static final String FROM_ONE = "is not a whole number from 1 to 2147483647";
    private static final String FROM_ZERO = "is not a whole number from 0 to 2147483647";

    /** Environment name, flag, default, bad values, and what the message says of them. */
    private static Stream<Arguments> badValues() {
        return Stream.of(
                arguments("BUILDKITD_PORT", "--port", "1234", PORTS, List.of("0", "65536", "1234x", "")),
                arguments("CHECK_FREQUENCY_MS", "--check-frequency-ms", "500", FROM_ONE,
                        List.of("0", "-500", "0.5", "500ms", "2147483648", "")),
                arguments("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "--quiet-seconds", "10", FROM_ZERO,
                        List.of("-1", "10s", "ten", "1e1", "")),
                arguments("MAX_WAIT_SECONDS", "--max-wait-seconds", "0", FROM_ZERO,
                        List.of("-1", "20m", "never", "9999999999", "")),
                arguments("CONNECTION_SOURCE", "--source", "auto", "expected one of [auto, netstat, ss, procfs]",
                        List.of("lsof", "SS", "netstat,ss", "")),
                arguments("LOG_FORMAT", "--log-format", "json", "expected one of [json, text]",
                        List.of("xml", "JSON", "")),
                arguments("LOG_PREFIX", "--log-prefix", "[PreStop Hook]", "Expected parameter",
                        List.of("--", "-V", "--debug", "-hook-", "--port=1")))
                .flatMap(setting -> ((List<?>) setting.get()[4]).stream().map(value -> arguments(
                        setting.get()[0], setting.get()[1], setting.get()[2], setting.get()[3], value)));
    }

    @ParameterizedTest
    @MethodSource("badValues")
    void aBadFlagEndsTheCommand(String variable, String flag, String standard, String allowed, String value) {
        try (Hook hook = Hook.start(Hook.env(), flag + "=" + value)) {
            assertThat(hook.exitCode()).isEqualTo(2);
            assertThat(hook.out()).isEmpty();
            assertThat(hook.err()).singleElement().asString()
                    .contains("'" + flag + "'").contains(allowed).contains(value);
        }
    }

    @ParameterizedTest
    @MethodSource("badValues")
    void aBadValueInTheEnvironmentIsLoggedAndTheDefaultIsUsed(String variable, String flag, String standard,
            String allowed, String value) {
        try (Server server = Server.start();
                Hook hook = Hook.start(Hook.env(variable, value), "--once", "--port=" + server.port())) {
            if (flag.equals("--port")) {
                return; // which has won
            }
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).singleElement().asString()
                    .contains("Ignoring " + variable + ", using " + standard + ".")
                    .contains(allowed).contains("'" + value + "'");
            assertThat(hook.out()).containsExactly("0");
        }
    }

    /** The user named a port, though we do not know which: buildkitd's socket alone is not enough then. */
    @ParameterizedTest
    @ValueSource(strings = {"0", "-1", "65536", "99999999999", "1234x", "0.0.0.0:1234", "", " ", "1.5", "0x4d2"})
    void aBadPortInTheEnvironmentIsLoggedAndSomethingMustListenOnTheDefault(String value, @TempDir Path directory) {
        Path socket = directory.resolve("b.sock");
        try (Server.OnSocket server = new Server.OnSocket(socket);
                Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", value, "BUILDKITD_SOCKET", socket), "--once")) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.messages("warning")).satisfiesExactly(
                    line -> assertThat(line)
                            .contains("Ignoring BUILDKITD_PORT, using 1234. ", "'" + value + "' " + PORTS),
                    line -> assertThat(line).endsWith(": nothing listens on port 1234."));
            assertThat(hook.out()).isEmpty();
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"--prot=1234", "--debug=maybe", "extra", "--port", "--once --once", "@/dev/null"})
    void aCommandLineThatIsNotUnderstoodEndsTheCommand(String arguments) {
        try (Hook hook = Hook.start(Hook.env(), arguments.split(" "))) {
            assertThat(hook.exitCode()).isEqualTo(2);
            assertThat(hook.err()).singleElement().asString().contains(arguments.split("=")[0].split(" ")[0]);
        }
    }

    @Test
    void allBadValuesOfTheEnvironmentTogetherAreLoggedAndTheHookWaits() {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "", "CHECK_FREQUENCY_MS",
                        "no", "LOG_PREFIX", "--once", "CONNECTION_SOURCE", "lsof", "LOG_FORMAT", "xml",
                        "MAX_WAIT_SECONDS", "1h"), "--port=" + server.port())) {
            hook.awaitLog("1 connection to port " + server.port());
            assertThat(hook.messages("warning")).hasSize(6).allMatch(line -> line.contains("Ignoring "));
            assertThat(hook.process().isAlive()).isTrue();
        }
    }

    /** As it does in every container of a namespace with a Service named buildkitd. */
    @Test
    void whatKubernetesSetsForAServiceIsNoSetting(@TempDir Path directory) {
        Path socket = directory.resolve("b.sock");
        try (Server.OnSocket server = new Server.OnSocket(socket);
                Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", "tcp://10.96.83.161:4321", "BUILDKITD_SOCKET", socket,
                        "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0"))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).anySatisfy(line -> assertThat(line).contains("to port 1234"));
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    @ParameterizedTest
    @CsvSource({"unix://{}/-x, {}/-x", "'{}/-x\n', {}/-x", "-x, -x", "'', ''", "' ', ''"})
    void theSocketMayBeAnAddressOrNothing(String value, String logged, @TempDir Path directory) {
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(directory.resolve("-x"));
                Hook hook = Hook.start(Hook.env("BUILDKITD_SOCKET", value.replace("{}", directory.toString())),
                        "--quiet-seconds=0", "--port=" + server.port())) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).anySatisfy(line -> assertThat(line).contains("0 connections to port "
                    + server.port() + (logged.isEmpty() ? "" : " and 0 to ")
                    + logged.replace("{}", directory.toString()) + ". Waited"));
        }
    }

    /** JVMs take them from the environment, so an image may have them for its own. */
    @ParameterizedTest
    @ValueSource(strings = {"-XX:+UseG1GC", "-XX:+UseParallelGC", "-XX:+UseZGC", "-XX:+UseShenandoahGC", "-Xms64m",
        "-Xmn200m", "-XX:MaxPermSize=64m", "--add-modules=java.sql", "-Dcom.sun.management.jmxremote.port=0"
            + " -Dcom.sun.management.jmxremote.authenticate=false -Dcom.sun.management.jmxremote.ssl=false"})
    void noOptionForOtherJvmsEndsTheHook(String options) {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(Hook.env("JAVA_TOOL_OPTIONS", options, "LOG_FORMAT", "text",
                        "BUILDKITD_PORT", server.port(), "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0"))) {
            hook.awaitLog("1 connection to port " + server.port());
            build.close();
            assertThat(hook.exitCode()).isZero();
        }
    }

    @Test
    void theDefaultsAreThoseOfTheContract() {
        try (Server server = Server.start();
                Hook hook = Hook.start(Hook.env("DEBUG", "1"), "--port=" + server.port())) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.age()).isGreaterThan(Duration.ofSeconds(10));
            assertThat(hook.messages("debug")).hasSizeBetween(20, 21);
            assertThat(hook.messages("info")).contains("[PreStop Hook] 0 connections to port " + server.port()
                    + " and 0 to buildkitd.sock. Waited 0 s so far.");
        }
    }

    @ParameterizedTest
    @CsvSource({"BUILDKITD_PORT, --port", "BUILDKITD_SOCKET, --socket", "CHECK_FREQUENCY_MS, --check-frequency-ms",
        "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS, --quiet-seconds", "MAX_WAIT_SECONDS, --max-wait-seconds",
        "CONNECTION_SOURCE, --source", "LOG_FORMAT, --log-format", "LOG_PREFIX, --log-prefix"})
    void aFlagWinsOverTheEnvironment(String variable, String flag) {
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> good = Map.of("BUILDKITD_PORT", String.valueOf(server.port()),
                    "BUILDKITD_SOCKET", "good.sock",
                    "CHECK_FREQUENCY_MS", "50", "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "3600",
                    "MAX_WAIT_SECONDS", "6", "CONNECTION_SOURCE", "procfs", "LOG_FORMAT", "text",
                    "LOG_PREFIX", "good:");
            Map<String, String> other = Map.of("BUILDKITD_PORT", "9", "BUILDKITD_SOCKET", "other.sock",
                    "CHECK_FREQUENCY_MS", "600000",
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0", "MAX_WAIT_SECONDS", "600",
                    "CONNECTION_SOURCE", "ss", "LOG_FORMAT", "json", "LOG_PREFIX", "other:");
            // All by environment, then one by flag with another value in the environment: they must do the same.
            Map<String, String> onlyEnvironment = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            onlyEnvironment.putAll(good);
            Map<String, String> withFlag = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            withFlag.putAll(good);
            withFlag.put(variable, other.get(variable));
            Map<String, String> badEnvironment = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            badEnvironment.putAll(good);
            badEnvironment.put(variable, variable.equals("LOG_PREFIX") ? "" : "?");
            try (Hook one = Hook.start(onlyEnvironment); Hook two = Hook.start(withFlag, flag, good.get(variable));
                    Hook three = Hook.start(badEnvironment, flag + "=" + good.get(variable))) {
                for (Hook hook : List.of(one, two, three)) {
                    assertThat(hook.exitCode()).isEqualTo(124);
                    List<String> lines = new ArrayList<>(hook.err());
                    assertThat(lines.remove(0)).isEqualTo("good: Waiting for build processes to finish...");
                    assertThat(lines).contains("good: Active connections to buildkitd: 1")
                            .hasSizeGreaterThan(3); // so there was more than one check
                    assertThat(lines.get(lines.size() - 1))
                            .isEqualTo("good: Giving up after MAX_WAIT_SECONDS, 6 s: 1 connection to port "
                                    + server.port() + " from 127.0.0.1:" + build.client().getLocalPort()
                                    + " and 0 to good.sock.");
                }
            }
        }
    }

    @Test
    void spacesAroundANumberDoNotMakeItBad() {
        try (Server server = Server.start(); Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", server.port() + "\n"),
                "--once")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
        }
    }

    @ParameterizedTest
    @CsvSource({"1,, 1", "1, --debug, 1", ", --debug, 1", "0,, 1", "'',, 0"})
    void debugIsOnByEnvironmentOrByFlag(String variable, String flag, int checks) {
        Map<String, String> settings = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
        if (variable != null) {
            settings.put("DEBUG", variable);
        }
        try (Server server = Server.start()) {
            settings.put("BUILDKITD_PORT", String.valueOf(server.port()));
            try (Hook hook = flag == null ? Hook.start(settings) : Hook.start(settings, flag)) {
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("debug")).hasSize(checks);
            }
        }
    }

    @Test
    void helpNamesEveryFlagItsVariableItsDefaultAndTheExitCodes() {
        try (Hook hook = Hook.start(Hook.env(), "--help")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
            String help = String.join("\n", hook.out()).replaceAll("\\s+", " ");
            badValues().forEach(setting -> assertThat(help)
                    .containsPattern(setting.get()[1] + "=\\w+ [^=]*\\(" + setting.get()[0] + "\\) Default: "
                            + Pattern.quote(setting.get()[2] + " ")));
            assertThat(help).contains("--socket=PATH", "(BUILDKITD_SOCKET) Default: buildkitd.sock", "--debug", "DEBUG",
                    "--once", "--sidecar=FIFO", "Exit codes: 0 quiet long enough", " 1 --once could not look",
                    " 2 bad command line", " 124 gave up at MAX_WAIT_SECONDS");
        }
    }

    @Test
    void versionIsOneLine() {
        try (Hook hook = Hook.start(Hook.env(), "--version")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).singleElement().asString().matches("buildkit-prestop \\d+\\.\\d+\\.\\d+");
        }
    }
}
