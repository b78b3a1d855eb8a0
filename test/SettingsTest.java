import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.nio.file.Path;
import java.time.Duration;
import java.util.*;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** Every setting, by environment and by flag, with good values and bad ones. */
class SettingsTest {

    private static final String PORTS = "is not a whole number from 1 to 65535";
    private static final String FROM_ONE = "is not a whole number from 1 to 2147483647";
    private static final String FROM_ZERO = "is not a whole number from 0 to 2147483647";

    /** Environment name, flag, default, bad values, and what the message says of them. */
    private static Stream<Arguments> badValues() {
        return Stream.of(
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
    void aBadPortEndsTheCommandAndInTheEnvironmentNeedsAListenerOnTheDefault(String value,
            @TempDir Path directory) {
        Path socket = directory.resolve("b.sock");
        try (Server.OnSocket server = new Server.OnSocket(socket);
                Hook byFlag = Hook.start(Hook.env(), "--port=" + value);
                Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", value, "BUILDKITD_SOCKET", socket), "--once")) {
            assertThat(byFlag.exitCode()).isEqualTo(2);
            assertThat(byFlag.err()).singleElement().asString().contains("'--port'", "'" + value + "' " + PORTS);
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
    @CsvSource({"unix://{}/-x, {}/-x", "'{}/-x\n', {}/-x", "-x, -x", "{}/[\\E(, {}/[\\E(", "'', ''", "' ', ''"})
    void theSocketMayBeAnAddressOrAnyPathOrNothing(String value, String logged, @TempDir Path directory) {
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(directory.resolve("-x"));
                Server.OnSocket odd = new Server.OnSocket(directory.resolve("[\\E("));
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
            assertThat(hook.messages("info").get(1)).startsWith("[PreStop Hook] 0 connections to port " + server.port()
                    + " and 0 to buildkitd.sock. Waited ");
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
                    "MAX_WAIT_SECONDS", "3", "CONNECTION_SOURCE", "procfs", "LOG_FORMAT", "text",
                    "LOG_PREFIX", "good:");
            Map<String, String> other = Map.of("BUILDKITD_PORT", "9", "BUILDKITD_SOCKET", "other.sock",
                    "CHECK_FREQUENCY_MS", "600000",
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0", "MAX_WAIT_SECONDS", "600",
                    "CONNECTION_SOURCE", "ss", "LOG_FORMAT", "json", "LOG_PREFIX", "other:");
            // The flag counts, whether the environment names something else or nonsense.
            for (String value : List.of(other.get(variable), variable.equals("LOG_PREFIX") ? "" : "?")) {
                Map<String, String> environment = Hook.env("PATH", "/nowhere", "DEBUG", "1");
                environment.putAll(good);
                environment.put(variable, value);
                try (Hook hook = Hook.start(environment, flag + "=" + good.get(variable))) {
                    assertThat(hook.exitCode()).isEqualTo(124);
                    assertThat(hook.err()).startsWith("good: Waiting for build processes to finish...")
                            .contains("good: Active connections to buildkitd: 1")
                            .hasSizeGreaterThan(4) // so there was more than one check
                            .endsWith("good: Giving up after MAX_WAIT_SECONDS, 3 s: 1 connection to port "
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
            assertThat(help).contains("--port=PORT", "(BUILDKITD_PORT) Default: 1234 ", "--socket=PATH",
                    "(BUILDKITD_SOCKET) Default: buildkitd.sock", "--debug", "DEBUG",
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
